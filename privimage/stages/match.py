"""DP-MERF and DP-MEPF (Harder et al. 2021, 2023): train a generator towards one noisy mean embedding."""

from privimage.config import Config
from privimage.data.sources import open_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.world import World
from privimage.families import family
from privimage.privacy.account import open_account
from privimage.privacy.mechanisms import MeanEmbedding
from privimage.privacy.mechanisms.embedding import embedding_of
from privimage.stages.embedding import embedding_sums, matched_generator
from privimage.stages.features import feature_map
from privimage.stages.noisy_statistic import Sensitive
from privimage.storage.rundir import RunDir


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """The noisy embedding, drawn once; then training that sees nothing else of the sensitive set.

    Writes match/embedding.npz, the noisy sums `values` float64 (rows * F + 1,) and the `charge` that they
    cost, and match/weights.pt with the averaged generator. Raises UserError for a resolution that the
    generator cannot have, or if the embedding was drawn before and is lost.
    """
    images = open_sensitive(config, "train", world, run_dir.sensitive)
    n_classes = len(images.classes) if config.data.sensitive.labelled else 0
    # A generator that cannot make the resolution is refused before anything is charged.
    size = family(config).sizes(config, n_classes)["generator"]
    # From here on the run sees the sensitive set through one noisy embedding only, kept in a file.
    account = open_account(config, run_dir, images, world)
    sensitive, path = Sensitive(images, account, n_classes), run_dir.stage("match") / "embedding.npz"
    plan, features = account.plan.the(MeanEmbedding), feature_map(config, run_dir, world)
    embedding = embedding_sums(config, run_dir, world, sensitive, plan, path, features)
    target = embedding_of(embedding.values, plan).mean
    generator = matched_generator(config, run_dir, world, n_classes, target, "match", features)
    if world.is_main:
        known = {
            "n_classes": n_classes,
            "classes": list(images.classes),
            "steps": 1,
            "charges": {"match": [embedding.charge]},
        }
        checkpoint.save(
            run_dir.stage("match") / "weights.pt",
            {"ema": generator.frozen(averaged=True).state_dict()} | known,
        )
    settings = config.match
    return {
        "images": settings.steps * settings.batch_size,
        "steps": settings.steps,
        "features": plan.features,
        "parameters": size,
    }
