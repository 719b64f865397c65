"""The sets: how many images, of what shape, by how large a generator."""

from privimage.evaluation import figures as draw
from privimage.families import family
from privimage.stages.measures.subject import Measure, Subject
from privimage.telemetry.curves import points


def _take(subject: Subject) -> dict:
    if not subject.world.is_main:
        return {}
    config, train, test, after = subject.config, subject.train, subject.test, subject.after
    labelled = config.data.sensitive.labelled
    # N and the number of test images are taken as public; how many images the groups of a set have is not.
    facts: dict = {
        "sensitive": {
            "images": None if train.grouping else train.count,
            "groups": train.count if train.grouping else None,
            "test_images": len(test.images) if test else 0,
        },
        "grid_classes": [],
        "synthetic": None,
        "parameters": None,
    }
    if after:
        facts["grid_classes"] = draw.sample_grid(
            subject.figures / "samples.png", after.images, after.labels, subject.n_classes
        )
        facts["synthetic"] = {
            "images": len(after),
            "resolution": config.data.resolution,
            "channels": config.data.channels,
            "classes": list(train.classes) if labelled else [],
        }
        sizes = family(config).sizes(config, subject.n_classes if labelled else 0)
        facts["parameters"] = sizes.get("generator", 0)
    steps, losses = points(subject.run.tensorboard / "pretrain", "loss")
    if len(steps) > 1:
        draw.loss_curve(subject.figures / "loss.png", steps, losses)
    return facts


SETS = Measure(("sensitive", "grid_classes", "synthetic", "parameters"), _take, figures=("samples", "loss"))
