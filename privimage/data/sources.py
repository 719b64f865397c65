"""Whole image sets in memory, and the sets that a configuration names."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from privimage.config import Config
from privimage.data.arrays import Known, Split
from privimage.data.decode import Source, decoded
from privimage.data.glyphs import glyph_source
from privimage.data.readers import (
    EMBEDDED,
    OWN_TEST_SPLIT,
    aligned,
    holds_test_split,
    open_source,
    without_labels,
)
from privimage.distributed.agreement import all_the_same
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.telemetry.progress import Progress


@dataclass(frozen=True)
class ImageSet:
    """A whole set in memory: images uint8 (N, C, H, W), labels int64 (N,).

    `fingerprint` is a digest of the images before crop and resize, independent of order, resolution, file
    format and labels. It names the ledger of the set.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    fingerprint: str

    @cached_property
    def content(self) -> bytes:
        """SHA-256 of pixels, labels and class names, in order.

        Whatever is computed from the set is a function of it.
        """
        shape = json.dumps([self.images.shape, self.classes]).encode()
        digest = hashlib.sha256(shape)
        # Hashed from the arrays' own memory, without a copy.
        for array in (self.images, self.labels):
            digest.update(np.ascontiguousarray(array).data)
        return digest.digest()


def read(source: Source, resolution: int, channels: int, workers: int, shown: bool = False) -> ImageSet:
    """Decode all images; `shown` shows a progress bar.

    Raises UserError that names the first one that does not decode.

    The order is that of the images' contents, then of their labels: the same for any names of files, and for
    any order in which a file system lists them.
    """
    # One array is allocated and filled in place.
    images = np.empty((len(source), channels, resolution, resolution), np.uint8)
    digests = [b""] * len(source)
    with Progress("read", len(source), shown=shown) as bar:
        for result in decoded(source, resolution, channels, workers):
            if result.image is None:
                raise UserError(result.problem)
            images[result.index] = result.image
            digests[result.index] = result.digest
            bar.advance()
    # By content, not by file name: renaming files must not change a seeded run.
    order = sorted(range(len(source)), key=lambda index: (digests[index], source.labels[index]))
    fingerprint = hashlib.sha256(b"".join(digests[index] for index in order)).hexdigest()
    return ImageSet(images[order], source.labels[order], source.classes, fingerprint)


def public_source(config: Config) -> Source:
    """The public set of a configuration. Raises UserError for anything that is wrong with it."""
    public = config.data.public
    if public.kind == "glyphs":
        glyphs = glyph_source(config.data.resolution, public.images_per_class)
        return glyphs if public.labelled else without_labels(glyphs)
    if public.path is None and public.kind not in EMBEDDED:
        raise UserError(f"data.public.path: kind {public.kind} needs one")
    return open_source(public.kind, public.path, "train", public.labelled)


def has_test_split(config: Config) -> bool:
    """Whether there are held-out sensitive images to evaluate on."""
    sensitive = config.data.sensitive
    return (
        sensitive.test_path is not None
        or sensitive.kind in OWN_TEST_SPLIT
        or (sensitive.path is not None and holds_test_split(sensitive.kind, sensitive.path))
    )


def open_sensitive(config: Config, split: Split, world: World, shown: bool = False) -> ImageSet:
    """`read_sensitive` on all ranks, which must have equal copies of the set: images, labels and classes.

    Two ranks with different copies would take one image into the same sum twice, or two images for one.
    Raises UserError on all ranks that names those whose copy differs.
    """
    images = read_sensitive(config, split, shown)
    path = config.data.sensitive.path or config.data.sensitive.kind
    all_the_same(
        world,
        images.content,
        f"data.sensitive: {path}: the {split} images or labels",
        "copy the set to them again",
    )
    return images


def sensitive_source(config: Config, split: Split) -> Source:
    """The sensitive set of a configuration, one split of it; its images are not decoded yet.

    Its classes are named by the data, or their number is `data.sensitive.classes`; those of the held-out
    images are found by their names among those of the training images. Raises UserError for anything that is
    wrong with it, or if it has not the number of images or classes that were stated.
    """
    sensitive = config.data.sensitive
    if split == "test":
        if not has_test_split(config):
            reason = f"needed, since kind {sensitive.kind} has no test split of its own here"
            raise UserError(f"data.sensitive.test_path: {reason}")
        return held_out_source(config, sensitive_source(config, "train").classes)
    if sensitive.path is None and sensitive.kind not in EMBEDDED:
        raise UserError(f"data.sensitive.path: kind {sensitive.kind} needs one")
    # The number of classes is a public statement of the owner; it is never counted from the labels.
    known = Known(count=sensitive.classes)
    source = open_source(sensitive.kind, sensitive.path, "train", sensitive.labelled, known)
    # What was stated is in the promise, so a difference is an error and never corrected in silence.
    stated = {"count": (sensitive.count, len(source))}
    if sensitive.labelled:
        stated["classes"] = (sensitive.classes, len(source.classes))
    for name, (said, true) in stated.items():
        if said is not None and said != true:
            raise UserError(f"data.sensitive.{name}: {said} was stated, the data have {true}")
    return source


def held_out_source(config: Config, classes: tuple[str, ...]) -> Source:
    """The held-out images, with the labels of the training images' `classes`."""
    sensitive = config.data.sensitive
    path, key = sensitive.path, "path"
    part: Split = "test"
    # A held-out set of its own is one split, unless it is a folder that has a test/ inside.
    if sensitive.test_path is not None:
        path, key = sensitive.test_path, "test_path"
        if sensitive.kind not in OWN_TEST_SPLIT and not holds_test_split(sensitive.kind, path):
            part = "train"
    source = open_source(sensitive.kind, path, part, sensitive.labelled, Known(names=classes))
    return aligned(source, classes, f"data.sensitive.{key}: {path}")


def read_sensitive(config: Config, split: Split, shown: bool = False) -> ImageSet:
    """The sensitive set of a configuration, one split of it; `shown` shows a progress bar.

    Raises UserError for anything that is wrong with it, see `sensitive_source`.
    """
    data = config.data
    return read(sensitive_source(config, split), data.resolution, data.channels, data.workers, shown)
