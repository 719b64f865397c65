"""How much a run will write, and whether its disk has room for it."""

import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from privimage.config import Config
from privimage.config.stages import STAGES
from privimage.data import beton
from privimage.data.store import JPEG_FROM
from privimage.data.writers import PAGE_BYTES
from privimage.families.base import image_shape
from privimage.models import parameters
from privimage.models.resnet import classifier
from privimage.privacy.mechanisms.embedding import embedding_length
from privimage.storage.rundir import RunDir

LOGS = 16 << 20  # bytes of curves, figures and reports
# Bytes a parameter. A checkpoint holds weights, two moments and the average in float32, and the old one stays
# until the new one is whole; beside it lie the weights that are kept. The query's has one moment and no
# average.
TRAINING, QUERY = 2 * 16 + 8, 2 * 8 + 2 * 4


Facts = tuple[int, tuple[str, ...]]  # of the public set: number of images, classes


def written(
    config: Config, public: Facts | None, sizes: Mapping[str, int], rows: int, sensitive: int = 0
) -> dict[str, int]:
    """Upper estimate of the bytes that each stage writes; what is not known counts as nothing.

    `sizes`: parameters of each network of the generator; `rows` and `sensitive`: classes and images of the
    sensitive set.
    """
    pixels, weights, samples = prod(image_shape(config)), sum(sizes.values()), config.synthesize.samples
    count, classes = public or (0, ())
    # A JPEG has about a quarter of the bytes; this is an upper estimate.
    jpeg = config.data.store != "npy" and config.data.resolution >= JPEG_FROM and beton.ffcv_installed()
    stored = pixels // 2 if jpeg else pixels
    embedding = 8 * embedding_length(config) * max(rows, 1)
    found = {
        "prepare": 2 * count * (stored + 64) + PAGE_BYTES,  # in parts, then put together
        "query": 0,
        "select": 0,
        "pretrain": TRAINING * weights,
        "warm": TRAINING * weights + embedding,
        "classify": 0,
        "finetune": TRAINING * weights,
        "match": TRAINING * weights + embedding,
        "evolve": 4 * weights + 3 * pixels * config.evolve.population * max(rows, 1),
        # Blocks and arrays, each other format with its headers, and the weights twice.
        "synthesize": samples * (2 * pixels + len(config.synthesize.formats) * (pixels + 1024)) + 8 * weights,
    }
    if config.data.public.kind == "beton":
        found["prepare"] = 0
    # The decoded set, once in parts and once in order, by the first stage that reads it.
    first = next((stage for stage in config.stages if STAGES[stage].sensitive), None)
    if first in found:
        found[first] += 2 * sensitive * (pixels + 64)
    if "query" in config.stages:
        with torch.device("meta"):
            network = parameters(classifier(config.query.network, config.data.channels, max(len(classes), 1)))
        found["query"] = QUERY * network + 8 * count
    return found


def standing(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def missing(run: RunDir, about: Mapping[str, int]) -> str:
    """The message for a disk without room for what stages will write; empty if there is room.

    `about`: bytes by stage. What a stage has written already, before a restart, is not counted again.
    """
    parts = {stage: max(0, bytes_ - held(run.path / stage)) for stage, bytes_ in about.items()}
    needed, free = sum(parts.values()) + LOGS, shutil.disk_usage(standing(run.path)).free
    if needed <= free:
        return ""
    largest = sorted(parts, key=lambda stage: -parts[stage])[:3]
    shown = ", ".join(f"{stage} {size(parts[stage])}" for stage in largest if parts[stage])
    reason = f"has {size(free)} free and the run will write about {size(needed)} ({shown})"
    return f"run.dir: {run.path} {reason}; make room, or choose another run.dir"


def held(folder: Path) -> int:
    """Bytes of the files below a folder; 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else 0


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
