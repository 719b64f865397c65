"""Learn the labels: train a private classifier, which stage `synthesize` asks about its images."""

from privimage.config import Config
from privimage.data.sources import open_sensitive
from privimage.distributed.world import World
from privimage.privacy.account import open_account
from privimage.stages.classifier import private_classifier
from privimage.stages.noisy_statistic import Sensitive
from privimage.storage.rundir import RunDir


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Write classify/weights.npz: `values` float64 (classes, d), and the `charge` that they cost.

    Raises UserError if they were trained before and are lost.
    """
    images = open_sensitive(config, "train", world, run_dir.sensitive)
    account = open_account(config, run_dir, images, world)
    sensitive = Sensitive(images, account, len(images.classes))
    private_classifier(config, run_dir, world, sensitive)
    return {"images": config.classify.steps * images.count}
