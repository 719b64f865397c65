"""By how much the private classifier leads the synthetic images, where that is left to be chosen."""

import torch

from privimage.config import Config
from privimage.data.sensitive import ImageDraws
from privimage.distributed.world import World
from privimage.families import restored, sampled
from privimage.recipes.choice import is_auto
from privimage.stages.label_counts import labels_in_turn
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say

TRIED = 250  # images without guidance
# Guidance costs variety. It pays where the generator is wrong about most classes itself (docs/results.md):
# where labels are contradicted more often than this share of how often labels by chance would be. Digits at
# 0.66 lose by it, the photographs that gained most are at 0.71.
MOSTLY_WRONG, WEIGHT = 0.68, 2.0


def with_guidance(config: Config, run_dir: RunDir, world: World, weights: dict) -> Config:
    """The configuration with a number for `synthesize.classifier_guidance`; all ranks call it together.

    `weights` are those of the generator and of the private classifier. The choice is post-processing of both.
    It is kept in a file, so that a stopped run goes on as it began.
    """
    if not is_auto(config.synthesize.classifier_guidance):
        return config
    path = run_dir.stage("synthesize") / "guidance.json"
    if world.is_main and not path.exists():
        write_json(path, _chosen(config, weights, world.device))
    found = world.broadcast_object(read_json(path) if world.is_main else None)
    return _with(config, found["classifier_guidance"])


def _chosen(config: Config, weights: dict, device: torch.device) -> dict[str, float]:
    if config.spec.generator != "diffusion":
        return {"classifier_guidance": 0.0}  # no other is led
    contradicted = _contradicted(_with(config, 0.0), weights, device)
    by_chance = TRIED * (1 - 1 / max(weights["n_classes"], 2))
    weight = WEIGHT if contradicted > MOSTLY_WRONG * by_chance else 0.0
    say(
        f"synthesize: without guidance, the classifier contradicts the labels of {contradicted} of {TRIED} "
        "images: " + (f"they are led by {weight:g}" if weight else "they need none")
    )
    return {"classifier_guidance": weight, "contradicted": contradicted / TRIED}


def _contradicted(config: Config, weights: dict, device: torch.device) -> int:
    """In how many of the first images the classifier sees another class than the one asked for."""
    generator, classifier = restored(config, weights, device)
    assert classifier is not None
    asked, size = torch.from_numpy(labels_in_turn(TRIED, weights["n_classes"])), config.synthesize.batch_size
    draws, count = ImageDraws(device), 0
    for indices, labels in zip(torch.arange(TRIED).split(size), asked.split(size), strict=True):
        images = sampled(config, generator, labels.to(device), indices.to(device), draws)
        count += int((classifier.labels(images) != labels.numpy()).sum())
    return count


def _with(config: Config, weight: float) -> Config:
    settings = config.synthesize.model_copy(update={"classifier_guidance": weight})
    return config.model_copy(update={"synthesize": settings})
