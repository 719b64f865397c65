"""Checks before the first stage of a run: everything that is wrong is reported at once.

A check is a function of a `Visit` that yields one line for each mistake, or raises UserError for one. What it
looks at is opened, not read: decoding whole sets and training stay where they are.
"""

import importlib.util
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

import numpy as np

from privimage.config import Config
from privimage.config.stages import DRAWING, SENSITIVE, STAGES, TRAINING
from privimage.data import beton, store
from privimage.data.decode import DamagedError, Source
from privimage.data.request import ONE_CLASS
from privimage.data.sources import (
    form,
    has_test_split,
    held_out_source,
    open_sensitive,
    public_source,
    sensitive_source,
)
from privimage.distributed.deepspeed_engine import deepspeed_settings
from privimage.distributed.world import World
from privimage.errors import Mistakes, UserError
from privimage.evaluation import extractor, semantics
from privimage.families import family, pretrained_family
from privimage.privacy import account
from privimage.privacy.accounting import epsilon
from privimage.privacy.plan import make_plan
from privimage.recipes.usefulness import busy, too_little_pretraining, too_little_signal
from privimage.releases.formats import FORMATS
from privimage.runs import room, starters
from privimage.runs.devices import devices
from privimage.runs.visit import CHARGED, Check, Visit, together
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say

SAMPLED = 32  # images of each set that are decoded, the first of as many classes
PUBLIC = set(STAGES) - set(SENSITIVE)  # stages that may take hours and see no sensitive image
NETWORKS = {"pretrain", *CHARGED}  # stages that build the generator
# What stages import when they come to it, and the package that has it; PrivImage itself is imported already.
PACKAGES = {
    "deepspeed": "'privimage[cluster]'",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "opacus": "opacus",
    "randomgen": "randomgen",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "torch_fidelity": "torch-fidelity",
}


def check(config: Config, run: RunDir, world: World, stages: Iterable[str]) -> None:
    """Look for whatever would end one of `stages` that is not finished yet. All ranks call it together.

    Makes no folder and spends nothing. Raises UserError, the same on all ranks, with one line for each
    mistake that names the key or the file, and the ranks where the main one has not met it.
    """
    # The main rank decides what is unfinished: on a slow file system others may not see its records yet.
    unfinished = frozenset(stage for stage in stages if run.record(stage) is None)
    visit = Visit(config, run, world, world.broadcast_object(unfinished))
    for each in (*EVERYWHERE, *(ONCE if world.is_main else ())):
        visit.attempt(each)
    device = devices(config, world, visit.stages)
    if device.state == "mistake":
        visit.mistakes.append(device.text)
    # All mistakes of all ranks at once, so that a user does not find them one by one.
    if mistakes := together(world.gather_objects(visit.mistakes)):
        raise Mistakes(mistakes)
    for warning in visit.warnings:
        say(f"warning: {warning}")
    _whole_set(visit)


def _run_directory(visit: Visit) -> Iterator[str]:
    """All ranks see one directory, and may write into it."""
    path = visit.run.path
    if not (path / "config.yaml").exists():  # which the main rank has just written
        reason = "is not what the main rank sees there; it must be on a file system that all nodes share"
        yield f"run.dir: {path} {reason}"
        return
    for folder in (path, *(entry for entry in sorted(path.iterdir()) if entry.is_dir())):
        if not os.access(folder, os.W_OK | os.X_OK):
            yield f"run.dir: {folder} cannot be written"


def packages(visit: Visit) -> Iterator[str]:
    """What is imported later is installed; it is not imported here, since that takes seconds."""
    config, stages = visit.config, visit.stages
    # Which stages need which package.
    wanted = {"tensorboard": stages & {"query", "evaluate", *NETWORKS}, "opacus": stages & {"finetune"}}
    wanted["randomgen"] = stages & ({*DRAWING} - {"synthesize"})
    wanted |= dict.fromkeys(("torch_fidelity", "matplotlib", "jinja2"), stages & {"evaluate"})
    wanted["sklearn"] = stages & {"evaluate"}
    if config.query.semantics == "clusters":
        wanted["sklearn"] |= stages & {"query"}
    if config.data.sensitive.kind == "digits":
        wanted["sklearn"] |= stages & set(SENSITIVE)
    if config.data.public.kind == "glyphs":
        wanted["matplotlib"] |= stages & {"prepare"}
    if "evolve" in config.stages and config.evolve.api == "glyphs":
        wanted["matplotlib"] |= stages & {"evolve", "synthesize"}
    if config.pretrain.engine == "deepspeed":
        wanted["deepspeed"] = stages & {"pretrain"}
    for module, needed_by in wanted.items():
        if needed_by and importlib.util.find_spec(module) is None:
            first = next(stage for stage in config.stages if stage in needed_by)
            yield f"{first}: needs {module}, which is not installed; pip install {PACKAGES[module]}"
    for name in config.synthesize.formats if "synthesize" in stages else ():
        if missing := FORMATS[name].missing():
            yield f"synthesize.formats: {name} needs what is not installed: {missing}"
    if "prepare" not in stages or beton.ffcv_installed():
        return
    path = config.data.public.path
    if config.data.public.kind == "beton" and path is not None and path.suffix == ".beton":
        yield f"data.public.path: {path} needs FFCV, which is not installed; tools/install_ffcv.sh"
    elif config.data.store == "beton":
        yield "data.store: beton needs FFCV, which is not installed; tools/install_ffcv.sh, or data.store=npy"


def sensitive_set(visit: Visit) -> None:
    """The sensitive set can be opened, and has as many images and classes as were stated."""
    if visit.needs(SENSITIVE):
        visit.sensitive = sensitive_source(visit.config, "train")
        _sample(visit, visit.sensitive, visit.config.data.sensitive.skip_bad)


def held_out_images(visit: Visit) -> None:
    """The held-out images can be opened, and have the classes of the training images."""
    if "evaluate" not in visit.stages:
        return
    if has_test_split(visit.config):
        if visit.sensitive is not None:
            source = held_out_source(visit.config, visit.sensitive)
            _sample(visit, source, visit.config.data.sensitive.skip_bad)
    elif visit.world.is_main:
        say("evaluate: data.sensitive.test_path names no held-out images: no accuracy will be measured")


def public_set(visit: Visit) -> None:
    """Ranks open a given store each, anything else is prepared by the main rank."""
    data = visit.config.data
    if "prepare" not in visit.stages:
        record = visit.run.record("prepare") if visit.world.is_main else None
        visit.public = (record["count"], tuple(record["classes"])) if record else None
    elif data.public.kind == "beton":
        if data.public.path is None:
            raise UserError("data.public.path: kind beton needs one")
        known = store.described(data.public.path, (data.channels, data.resolution, data.resolution))
        visit.public = (known.count, known.classes if data.public.labelled else ONE_CLASS)
    elif visit.world.is_main:
        source = public_source(visit.config)
        visit.public = (len(source), source.classes)
        _sample(visit, source, data.public.skip_bad)


def _sample(visit: Visit, source: Source, skip_bad: bool) -> None:
    """See that the first image of each class can be used, and say what is left out of the set.

    Raises UserError for one that cannot.
    """
    if visit.world.is_main:
        for line in source.notes:
            say(line)
    for index in np.sort(np.unique(source.labels, return_index=True)[1])[:SAMPLED]:
        with suppress(*([DamagedError] if skip_bad else [])):
            source.image(int(index), form(visit.config))


def engine_settings(visit: Visit) -> None:
    """DeepSpeed's settings are there and may be used."""
    settings = visit.config.pretrain
    if "pretrain" in visit.stages and settings.engine == "deepspeed":
        deepspeed_settings(settings.deepspeed_config, 1, bf16=False)


def feature_weights(visit: Visit) -> None:
    """The weights of networks whose features are compared are there and what they should be."""
    settings, by = visit.config.evaluate, visit.config.evolve.features
    if "evolve" in visit.stages and by != "query":
        extractor.given(by, "evolve.features")
    if "evaluate" in visit.stages:
        extractor.weights_for(settings.features, settings.inception_weights)
        extractor.vision(settings.vision_weights)


def word_vectors(visit: Visit) -> None:
    """The word vectors are there and what they should be."""
    path = visit.config.evaluate.word_vectors
    if "evaluate" in visit.stages and path is not None:
        semantics.check_vectors(path)


def votes(visit: Visit) -> Iterator[str]:
    """There are enough public classes or clusters, and images for them."""
    settings, method, rows, columns = visit.config.select, visit.config.spec, visit.rows, visit.columns
    clusters = visit.config.query.semantics == "clusters"
    if "query" in visit.stages and visit.public:
        images, classes = visit.public
        if method.pretraining == "selected" and not clusters and len(classes) < 2:
            reason = "the public set has one class, so there is nothing to learn"
            yield f"query.semantics: {reason}; use query.semantics=clusters"
            return
        if clusters and visit.config.query.clusters > images:
            yield f"query.clusters: {visit.config.query.clusters} are more than the {images} public images"
    if "select" not in visit.stages or columns is None:
        return
    kind = "clusters" if clusters else "public classes"
    if method.pretraining == "selected" and settings.per_image > columns:
        yield f"select.per_image: {settings.per_image} is more than the {columns} {kind}"
    if rows is not None and rows * settings.per_class > columns:
        reason = f"{rows} sensitive classes times {settings.per_class} are more than the {columns} {kind}"
        yield f"select.per_class: {reason}"


def networks(visit: Visit) -> Iterator[str]:
    """The settings of the networks fit together, and the engine can train them."""
    config = visit.config
    if not visit.needs(NETWORKS):
        return
    if "pretrain" in visit.stages and config.pretrain.engine not in pretrained_family(config).engines:
        yield f"pretrain.engine: {config.pretrain.engine} trains one network and a GAN has two; choose ddp"
    visit.sizes = family(config).sizes(config, visit.rows or 0)


def privacy_plan(visit: Visit) -> Iterator[str]:
    """The promise can be kept, within the budget that is named.

    What is found is cached: the stages that follow do not search again.
    """
    count = visit.count
    begun = (visit.run.path / "private" / "account.json").exists()  # with a plan of its own
    if not (count and visit.config.spec.private and visit.opens_account) or begun:
        return
    plan, budget = make_plan(visit.config, count), visit.config.privacy.budget
    if budget and (needed := epsilon(plan.compositions, budget.delta, plan.accountant)) > budget.epsilon:
        yield f"privacy.budget: this run alone needs epsilon {needed:.4g}, more than {budget.epsilon:g}"


def usefulness(visit: Visit) -> None:
    """Say where noise must drown what the set can teach, or time is too short; the run goes on."""
    visit.warnings += busy(visit.config, visit.world.device.type)
    if visit.needs(["pretrain"]):
        visit.warnings += too_little_pretraining(visit.config)
    if visit.needs(TRAINING) and visit.sensitive is not None and visit.count is not None:
        visit.warnings += too_little_signal(visit.config, visit.count, visit.rows or 0)


def ledger(visit: Visit) -> None:
    """The ledger can be written, and is the one that a run has written to."""
    if visit.opens_account:
        account.check(visit.config, visit.run)


def _whole_set(visit: Visit) -> None:
    """Decode the sensitive set where public stages come before it, which take longer.

    A damaged image, a rank with another copy and a spent budget are reported now. All ranks call it together.
    """
    if not visit.opens_account or not visit.needs(PUBLIC):
        return
    sensitive = open_sensitive(visit.config, "train", visit.world, visit.run.sensitive)
    if visit.world.is_main:
        account.check(visit.config, visit.run, sensitive)


def disk_space(visit: Visit) -> Iterator[str]:
    """The disk has room for what will be written."""
    about = room.written(visit.config, visit.public, visit.sizes, visit.rows or 0, len(visit.sensitive or ()))
    if reason := room.missing(visit.run, {stage: about.get(stage, 0) for stage in visit.stages}):
        yield reason


# On every rank: what may differ from node to node.
EVERYWHERE: tuple[Check, ...] = (
    _run_directory,
    packages,
    sensitive_set,
    held_out_images,
    public_set,
    engine_settings,
    feature_weights,
    word_vectors,
)
# On the main rank: what is the same for all.
ONCE: tuple[Check, ...] = (votes, networks, starters.fitting, privacy_plan, usefulness, ledger, disk_space)
