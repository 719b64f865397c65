"""Files of images: which ones are, which are left out and how that is told, and how one is opened."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from PIL import Image

from privimage.data import dicom
from privimage.data.pixels import Values
from privimage.errors import UserError

# What systems leave behind, ignored as other tools do; and all names that begin with a dot.
LEFT_BEHIND = {"thumbs.db", "desktop.ini", "__macosx"}
# Formats of which Pillow knows the head only, or that need another program.
NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Known here even where this Pillow lacks the library for them: then they are refused, not left out.
ALWAYS = {".avif", ".jp2", ".j2k", ".webp"}
HEIF = {".heic", ".heif"}  # as telephones write; opened by a package of its own
FRAMES = {".gif", ".tif", ".tiff", ".apng", *dicom.SUFFIXES}  # of which the first frame or page is read
SHOWN = 8  # kinds of files in a message


@cache
def suffixes() -> frozenset[str]:
    """The endings of the names of images, in lower case."""
    Image.init()
    _with_heif()
    known = {
        suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in NOT_READ
    }
    return frozenset(known | ALWAYS | HEIF | dicom.SUFFIXES)


@cache
def _with_heif() -> bool:
    """Let Pillow open HEIF files; whether it can."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is ignored without a word."""
    return name.startswith(".") or name.lower() in LEFT_BEHIND


def suffix_of(name: str) -> str:
    """The ending of a name in lower case, with its dot."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def is_image(path: str) -> bool:
    """Whether a file is an image, by its name; DICOM files often have no suffix, or the end of a number."""
    suffix = suffix_of(path)
    return suffix in suffixes() or (not suffix.strip(".0123456789") and dicom.is_dicom(path))


def below(folder: Path) -> Iterator[str]:
    """All files below a folder that are not hidden, in the order of their paths."""
    # By names alone: a million paths as objects would take minutes.
    found = []
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not is_hidden(name) and not _leads_back(place, name)]
        found += [os.path.join(place, name) for name in names if not is_hidden(name)]  # noqa: PTH118
    return iter(sorted(found))


def _leads_back(place: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in."""
    path = Path(place, name)
    return path.is_symlink() and Path(place).resolve().is_relative_to(path.resolve())


def open_file(path: str) -> Image.Image | Values:
    """An image file. Raises whatever its decoder raises."""
    suffix = suffix_of(path)
    if suffix in dicom.SUFFIXES or not suffix.strip(".0123456789"):
        return dicom.read(path)
    return open_image(path, suffix)


def open_image(file: object, suffix: str) -> Image.Image:
    """An image that Pillow opens, by its path or as an open file.

    Raises UserError where the library of its format is missing.
    """
    if suffix in HEIF and not _with_heif():
        raise UserError("needs pillow-heif, which is not installed; pip install 'privimage[heif]'")
    try:
        return Image.open(file)  # type: ignore[arg-type]
    except Image.UnidentifiedImageError:
        suffixes()
        if suffix in ALWAYS and suffix not in Image.EXTENSION:
            raise UserError(f"this Pillow cannot read {suffix}; pip install --upgrade pillow") from None
        raise


def others(folder: Path, read: set[str], split: str) -> list[str]:
    """Files below a folder that are neither read nor of a `split`, by their names; none if it is a file."""
    return [path for path in below(folder) if path not in read and split not in path[len(str(folder)) :]]


def notes(place: str, read: Iterable[str], skipped: Iterable[str]) -> tuple[str, ...]:
    """What is to be said of the names of files that are read, and of those that are not: a line each."""
    lines = []
    left = Counter(suffix_of(name) or "without a suffix" for name in skipped)
    if left:
        total = sum(left.values())
        lines.append(f"{place}: {total} file{'s' if total > 1 else ''} skipped: {counted(left)}")
    frames = Counter(suffix for name in read if (suffix := suffix_of(name)) in FRAMES)
    if frames:
        lines.append(f"{place}: {counted(frames)}: of several frames or pages the first is read")
    return tuple(lines)


def counted(kinds: Counter[str]) -> str:
    """Kinds of files and their numbers, the most frequent first."""
    common = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    more = sum(number for _, number in common[SHOWN:])
    return ", ".join(f"{number} {kind}" for kind, number in common[:SHOWN]) + (
        f", {more} others" if more else ""
    )
