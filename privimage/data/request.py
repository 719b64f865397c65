"""What is asked of a reader of image sets: where the set is, and what is known of it beforehand."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from privimage.errors import UserError

Split = Literal["train", "test"]
ONE_CLASS = ("all",)  # the class of sets without labels


@dataclass(frozen=True)
class Known:
    """What is known of a set's classes without its images.

    Names, or their number, or that the data name them.

    Given for sensitive sets. There one image must not decide whether a class exists, so a class may have no
    image, and classes are never counted from the labels.
    """

    names: tuple[str, ...] | None = None
    count: int | None = None


@dataclass(frozen=True)
class Columns:
    """Columns of a table, or arrays of a file, by name; None: the usual names, and no groups."""

    image: str | None = None
    label: str | None = None
    group: str | None = None  # of folders: a level of sub-folders, or a regular expression on the path


@dataclass(frozen=True)
class Request:
    """What a reader is asked for.

    Without labels there is one class. Without `known` each class must have an image.
    """

    path: Path
    split: Split = "train"
    labelled: bool = True
    known: Known | None = None
    columns: Columns = Columns()


def column(place: Path, there: Sequence[str], given: str | None, usual: tuple[str, ...], key: str) -> str:
    """The column of `there` that is `given`, else the only one of the `usual` names.

    Raises UserError, about `place`, where there is none or several; `key` is the setting that names it.
    """
    found = [name for name in ((given,) if given else usual) if name in there]
    if len(found) != 1:
        problem = f"no column {given!r}" if given else f"{len(found) or 'none'} of its columns may be meant"
        raise UserError(f"{place}: {problem} (found: {', '.join(map(str, there[:10]))}); {key} names it")
    return found[0]


def part(request: Request, suffix: str = "") -> Path:
    """Where the split is: a folder with train/ and test/ holds both, any other path is one split.

    `suffix` is that of the files, as train.npz. Raises UserError for a folder without the held-out images.
    """
    inside = request.path / f"{request.split}{suffix}"
    if inside.exists():
        return inside
    if request.split == "test":
        reason = f"has no {inside.name}; name the held-out images in data.sensitive.test_path"
        raise UserError(f"{request.path}: {reason}")
    return request.path
