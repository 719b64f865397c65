"""The image sets that a configuration names."""

from dataclasses import replace
from pathlib import Path

from privimage.config import Config
from privimage.data.decode import Source
from privimage.data.glyphs import glyph_source
from privimage.data.groups import require_apart, units
from privimage.data.private_store import ImageSet, open_set, stamp
from privimage.data.readers import (
    EMBEDDED,
    OWN_TEST_SPLIT,
    aligned,
    holds_test_split,
    open_source,
    without_labels,
)
from privimage.data.request import Columns, Known, Split
from privimage.data.transforms import Form
from privimage.distributed.agreement import all_the_same
from privimage.distributed.world import World
from privimage.errors import UserError


def form(config: Config) -> Form:
    """What both sets become."""
    data = config.data
    return Form(data.resolution, data.channels, data.fit, data.background, data.window)


def public_source(config: Config) -> Source:
    """The public set of a configuration. Raises UserError for anything that is wrong with it."""
    public = config.data.public
    if public.kind == "glyphs":
        glyphs = glyph_source(config.data.resolution, public.images_per_class)
        return glyphs if public.labelled else without_labels(glyphs)
    if public.path is None and public.kind not in EMBEDDED:
        raise UserError(f"data.public.path: kind {public.kind} needs one")
    columns = Columns(public.image_column, public.label_column)
    return open_source(public.kind, public.path, "train", public.labelled, columns=columns)


def has_test_split(config: Config) -> bool:
    """Whether there are held-out sensitive images to evaluate on."""
    sensitive = config.data.sensitive
    return (
        sensitive.test_path is not None
        or sensitive.kind in OWN_TEST_SPLIT
        or (sensitive.path is not None and holds_test_split(sensitive.kind, sensitive.path))
    )


def open_sensitive(config: Config, split: Split, world: World, folder: Path) -> ImageSet:
    """One split of the sensitive set of a configuration, on all ranks, which call it together.

    It is decoded into `folder` once, by all ranks, and read from there by later stages and restarts. Raises
    UserError, on all ranks, for whatever is wrong with the set, and Stopped with what was decoded kept.
    """
    data, grouped = config.data, config.privacy.unit == "group" and split == "train"

    def source() -> Source:
        opened = sensitive_source(config, split)
        # Groups that are not the unit of the promise are for the division into training and test alone.
        if not grouped:
            opened = replace(opened, groups=None)
        path = data.sensitive.path or data.sensitive.kind
        all_the_same(
            world,
            opened.digest_of_labels(),
            f"data.sensitive: {path}: the number of {split} images, their labels, classes or groups",
            "copy the set to them again",
        )
        return opened

    sensitive = data.sensitive
    path = sensitive.test_path if split == "test" and sensitive.test_path else sensitive.path
    # Everything that decides what the decoded images are. Where the original is not at hand any more, what
    # was made from it stays.
    key = {
        "split": split,
        "form": form(config).to_dict(),
        "sensitive": sensitive.model_dump(mode="json", exclude={"residence", "per_group"}),
        "grouped": grouped,
        "stamp": stamp(path),
    }
    return open_set(
        folder / split,
        key,
        source,
        form(config),
        data.workers,
        world,
        f"read {split}",
        sensitive.skip_bad,
    )


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
        return held_out_source(config, sensitive_source(config, "train"))
    if sensitive.path is None and sensitive.kind not in EMBEDDED:
        raise UserError(f"data.sensitive.path: kind {sensitive.kind} needs one")
    # Classes are a public statement of the owner, or named by the data; they are never counted from labels.
    names = sensitive.classes if isinstance(sensitive.classes, tuple) else None
    known = Known(names, None if names else sensitive.class_count)
    source = open_source(
        sensitive.kind, sensitive.path, "train", sensitive.labelled, known, _sensitive_columns(config)
    )
    if names and sensitive.labelled:
        source = aligned(source, names, f"data.sensitive.classes: {sensitive.path}", "those that were stated")
    # What was stated is in the promise, so a difference is an error and never corrected in silence.
    stated = {"count": (sensitive.count, count_of(config, source))}
    if sensitive.labelled:
        stated["classes"] = (sensitive.class_count, len(source.classes))
    for name, (said, true) in stated.items():
        if said is not None and said != true:
            raise UserError(f"data.sensitive.{name}: {said} was stated, the data have {true}")
    return source


def _sensitive_columns(config: Config) -> Columns:
    sensitive = config.data.sensitive
    group = None if sensitive.group is None else str(sensitive.group)
    return Columns(sensitive.image_column, sensitive.label_column, group)


def count_of(config: Config, source: Source) -> int:
    """N of the training images: how many images there are, or groups where these are the unit."""
    return units(source) if config.privacy.unit == "group" else len(source)


def held_out_source(config: Config, train: Source) -> Source:
    """The held-out images, with the labels of the training images' classes.

    Raises UserError for anything that is wrong with them, and if a group is in both sets.
    """
    sensitive, classes = config.data.sensitive, train.classes
    path, key = sensitive.path, "path"
    part: Split = "test"
    # A held-out set of its own is one split, unless it is a folder that has a test/ inside.
    if sensitive.test_path is not None:
        path, key = sensitive.test_path, "test_path"
        if sensitive.kind not in OWN_TEST_SPLIT and not holds_test_split(sensitive.kind, path):
            part = "train"
    known = Known(names=classes)
    source = open_source(sensitive.kind, path, part, sensitive.labelled, known, _sensitive_columns(config))
    require_apart(train, source)
    return aligned(source, classes, f"data.sensitive.{key}: {path}")
