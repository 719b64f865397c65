"""Time and memory of every stage, from short measurements."""

import torch

from privimage.config import Config
from privimage.evaluation.benchmark import RECIPES
from privimage.evaluation.report import BENCHMARK
from privimage.families import family
from privimage.families.base import image_shape
from privimage.families.work import PARAMETER_BYTES, Work, classifier_pass, label_features_pass
from privimage.models import parameters
from privimage.models.label_features import LabelFeatures
from privimage.models.resnet import classifier
from privimage.privacy.plan import PrivacyPlan

# Seconds of scikit-learn's classifiers per image, pixel and epoch, of one core: LR, MLP.
LR_SECONDS, MLP_SECONDS, MLP_IMAGES = 4e-7, 4e-8, 2_000_000
# Seconds of a product in float64, and of bringing a feature there, of one core.
MULTIPLY, CONVERT = 2e-10, 1e-9


def work_of(config: Config, plan: PrivacyPlan, count: int, classes: int, device: torch.device) -> list[Work]:
    """The work of all stages of the method but `prepare`, whose time is that of the disk, in order.

    `config` has no `auto` but those of precision. `count` and `classes` (0 if unlabelled) are those of the
    sensitive set.
    """
    found = [*_query(config, count, device), *_classify(config, count, classes, device)]
    found += family(config).work(config, plan, classes, device)
    return [*found, *_evaluate(config, count, classes, device)]


def _query(config: Config, count: int, device: torch.device) -> list[Work]:
    """Training of the query network, three times a forward pass for each image, and the votes."""
    if "query" not in config.stages:
        return []
    settings = config.query
    seconds, bytes_ = classifier_pass(
        settings.network, image_shape(config), 1000, device, config.runtime.precision
    )
    with torch.device("meta"):
        size = PARAMETER_BYTES * parameters(classifier(settings.network, config.data.channels, 1000))
    images = settings.steps * settings.batch_size
    works = [
        Work(
            "query",
            settings.steps,
            settings.batch_size,
            3 * images * seconds,
            size + settings.batch_size * bytes_,
        )
    ]
    if config.spec.pretraining == "selected":
        works.append(Work("select", 1, count, count * seconds, size))
    return works


def _classify(config: Config, count: int, classes: int, device: torch.device) -> list[Work]:
    """Features of all images, once, and products with them, two in each step."""
    if "classify" not in config.stages:
        return []
    shape, steps = image_shape(config), config.classify.steps
    d = LabelFeatures.count(shape, config.label_network)
    views = 1 + config.data.flip  # an image and its mirror image
    seconds = views * label_features_pass(config.label_network, shape, device, "fp32")
    seconds += steps * 2 * d * (classes * MULTIPLY + CONVERT)
    return [Work("classify", steps, count, count * seconds, 2.0 * count * d)]


def _evaluate(config: Config, count: int, classes: int, device: torch.device) -> list[Work]:
    """Training of the classifiers on the synthetic images, on those from before fine-tuning, and on as many
    real ones.
    """
    if classes < 2 or config.spec.generator == "none":
        return []
    settings, samples = config.evaluate, config.synthesize.samples
    images = samples + (settings.fidelity_samples if settings.before else 0)
    images += min(samples, count * config.per_unit) if settings.ceiling else 0
    channels, height, width = image_shape(config)
    pixels, seconds = channels * height * width, 0.0
    if "cnn" in settings.classifiers:
        a_pass = classifier_pass("cnn", image_shape(config), classes, device, config.runtime.precision)[0]
        seconds += 3 * images * settings.cnn_epochs * a_pass
    for key in BENCHMARK:
        if key in settings.classifiers:
            network = f"{settings.benchmark} {key}"
            a_pass = classifier_pass(network, image_shape(config), classes, device, "fp32")[0]
            epochs = settings.benchmark_epochs or RECIPES[settings.benchmark].epochs
            seconds += 3 * images * epochs * a_pass
    if "lr" in settings.classifiers:
        seconds += images * pixels * LR_SECONDS
    if "mlp" in settings.classifiers:
        seconds += min(200 * images, 2 * MLP_IMAGES) * pixels * MLP_SECONDS
    return [Work("evaluate", settings.cnn_epochs, images, seconds, 4.0 * 3 * images * pixels)]
