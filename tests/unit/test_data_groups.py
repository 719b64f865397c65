"""Whom an image belongs to: read from paths and arrays, kept beside the images, and never in both splits."""

from pathlib import Path

import numpy as np
import pytest
from data_sets import numbered, numbers, read_sensitive, save_npz
from PIL import Image
from ranks import TINY

from privimage.config import Config, load
from privimage.data.groups import grouping
from privimage.data.groups import numbered as numbered_groups
from privimage.data.sources import count_of, held_out_source, sensitive_source
from privimage.errors import UserError

IMAGES = numbered(12)
LABELS = np.arange(12) % 2
CLASSES = np.array(["a", "b"])
PEOPLE = np.array(["p", "q", "q", "p", "r", "q", "r", "q", "s", "s", "s", "s"])


def at(path: Path, kind: str, group: object, *more: str) -> Config:
    options = [f"data.sensitive.kind={kind}", f"data.sensitive.path={path}", f"data.sensitive.group={group}"]
    return load(TINY, [*options, "privacy.unit=group", *more])


def folder(path: Path, names: list[str]) -> Path:
    for name, image in zip(names, IMAGES, strict=False):
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path / name)
    return path


@pytest.mark.parametrize(
    ("names", "group", "people"),
    [
        (["a/p/1.png", "a/q/2.png", "b/q/3.png"], 2, ["p", "q", "q"]),
        (["a/p-1.png", "a/q-1.png", "b/q-2.png"], r"([a-z]+)-\d+", ["p", "q", "q"]),
        (["a/p1.png", "a/q1.png", "b/q2.png"], "[pq]", ["p", "q", "q"]),
    ],
)
def test_groups_are_read_from_paths(
    tmp_path: Path, names: list[str], group: object, people: list[str]
) -> None:
    source = sensitive_source(
        at(folder(tmp_path / "set", names), "folder", f"'{group}'" if isinstance(group, str) else group),
        "train",
    )
    assert list(source.groups) == people and source.labels.tolist() == [0, 0, 1]


def test_folders_of_classes_may_be_in_folders_of_groups(tmp_path: Path) -> None:
    path = folder(tmp_path / "set", ["p/cat/1.png", "p/dog/2.png", "q/dog/3.png"])
    with pytest.raises(
        UserError, match=r"q: no sub-folder 'cat', which other groups have; make an empty one"
    ):
        sensitive_source(at(path, "folder", 1), "train")
    (path / "q" / "cat").mkdir()
    source = sensitive_source(at(path, "folder", 1), "train")
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1, 1]
    assert list(source.groups) == ["p", "p", "q"]


@pytest.mark.parametrize(
    ("names", "group", "told"),
    [
        (["a/1.png"], 2, r"a/1\.png in .* is in no folder of level 2"),
        (["a/1.png"], "'x(.)'", r"does not match a/1\.png"),
        (["a/1.png"], "'x('", "is no regular expression"),
        (["p/1.png"], 1, r"1\.png is not in GROUP/CLASS/"),
        (["a/p.png", "a/q.png"], "'p?'", "belongs to no group"),
    ],
)
def test_an_image_that_belongs_to_nobody_is_named(
    tmp_path: Path, names: list[str], group: object, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        sensitive_source(at(folder(tmp_path / "set", names), "folder", group), "train")


def test_a_missing_value_is_no_person(tmp_path: Path) -> None:
    people = np.array([1.0, np.nan, 2.0] * 4)
    path = save_npz(tmp_path / "set.npz", IMAGES, LABELS, classes=CLASSES, person=people)
    with pytest.raises(UserError, match=r"image 1 belongs to no group \('nan'\)"):
        sensitive_source(at(path, "npz", "person"), "train")


def test_kinds_that_name_nobody_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.sensitive\.group: kind digits does not say"):
        sensitive_source(load(TINY, ["data.sensitive.group=person"]), "train")


@pytest.fixture
def people(tmp_path: Path) -> Path:
    return save_npz(tmp_path / "set.npz", IMAGES, LABELS, classes=CLASSES, person=PEOPLE)


def test_n_is_the_number_of_groups_and_must_be_what_was_stated(people: Path) -> None:
    config = at(people, "npz", "person", "data.sensitive.count=4")
    assert count_of(config, sensitive_source(config, "train")) == 4
    with pytest.raises(UserError, match=r"data\.sensitive\.count: 12 was stated, the data have 4"):
        sensitive_source(at(people, "npz", "person", "data.sensitive.count=12"), "train")


def test_the_store_keeps_who_an_image_belongs_to(people: Path) -> None:
    found = read_sensitive(at(people, "npz", "person"), "train")
    assert found.count == 4 and found.grouping
    # Numbered in the order of the images, which is that of their contents.
    of_images = PEOPLE[numbers(found.images[:])]
    assert found.groups.tolist() == numbered_groups(of_images).tolist()
    assert found.groups[0] == 0 and len(set(found.groups.tolist())) == 4
    alone = read_sensitive(at(people, "npz", "person", "privacy.unit=image"), "train")
    assert (alone.count, alone.grouping, alone.groups.tolist()) == (12, "", list(range(12)))
    assert alone.fingerprint == found.fingerprint and alone.content != found.content


def test_other_groups_are_another_content_and_other_names_of_people_are_not(tmp_path: Path) -> None:
    """The ledger's file is the same: it is named by the images."""
    renamed = np.array([f"no. {name}" for name in PEOPLE])
    moved = np.where(np.arange(12) == 5, "p", PEOPLE)
    found = []
    for number, names in enumerate((PEOPLE, renamed, moved)):
        path = save_npz(tmp_path / f"{number}.npz", IMAGES, LABELS, classes=CLASSES, person=names)
        found.append(read_sensitive(at(path, "npz", "person"), "train"))
    first, second, third = found
    assert first.content == second.content and first.grouping == second.grouping
    assert third.content != first.content and third.grouping != first.grouping
    assert first.fingerprint == second.fingerprint == third.fingerprint


def test_a_grouping_is_named_by_which_images_belong_together() -> None:
    digests = np.random.default_rng(0).integers(0, 256, (6, 32), dtype=np.uint8)
    groups = np.array([0, 1, 1, 2, 0, 2])
    order = np.array([5, 3, 0, 4, 1, 2])
    assert grouping(digests[order], np.array([7, 7, 3, 3, 5, 5])) == grouping(digests, groups)
    assert grouping(digests, np.array([0, 1, 1, 2, 0, 0])) != grouping(digests, groups)
    assert grouping(digests, np.arange(6)) != grouping(digests, np.zeros(6, int))


@pytest.mark.parametrize("unit", ["group", "image"])
def test_a_person_in_both_splits_is_told(tmp_path: Path, people: Path, unit: str) -> None:
    """An error, whatever the unit: accuracy and memorisation would be those of people who were trained on."""
    for names, wrong in ((["t", "u", "t"], False), (["t", "q", "p"], True)):
        test = save_npz(
            tmp_path / "test.npz", IMAGES[:3], LABELS[:3], classes=CLASSES, person=np.array(names)
        )
        config = at(people, "npz", "person", f"data.sensitive.test_path={test}", f"privacy.unit={unit}")
        train = sensitive_source(config, "train")
        if not wrong:
            held_out_source(config, train)
            continue
        with pytest.raises(UserError, match="2 of the 3 groups of the held-out images are in the training"):
            held_out_source(config, train)
        with pytest.raises(UserError, match="divide the set by group"):
            read_sensitive(config, "test")
