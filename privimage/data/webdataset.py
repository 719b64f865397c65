"""Image sets in WebDataset's tars: the files of one sample lie beside each other and share a name."""

import json
import tarfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from privimage.data import files, labels
from privimage.data.arrays import with_groups
from privimage.data.decode import Source
from privimage.data.path_groups import KEY, grouped_by_path
from privimage.data.request import Request, part
from privimage.errors import UserError

LABELS = ("cls", "label")  # usual names of a label in a .json


def holds_test_split(path: Path) -> bool:
    """Whether a folder has tars of held-out images."""
    return path.is_dir() and any(_tars(path, "test"))


def read(request: Request) -> Source:
    """All tars of a folder in order, or one; labels from .cls, .txt or a field of .json, groups from a field
    of .json or the name of the sample.

    In a folder whose tars are named train* and test*, those are the splits. Raises UserError for damaged tars
    and samples without a label or a group.
    """
    path, group = request.path, request.columns.group
    tars = [path]
    if path.is_dir():
        tars = _tars(path, request.split) or sorted(part(request).glob("*.tar"))
        if not tars:
            raise UserError(f"{path}: holds no .tar{'' if request.split == 'train' else ' of test images'}")
    items: list[tuple[str, int, int, str]] = []
    names: list[str] = []
    raw: list[str] = []
    groups: list[str] = []
    skipped: list[str] = []
    for tar in tars:
        for sample, members in _samples(tar):
            known = [suffix for suffix in members if f".{suffix.split('.')[-1]}" in files.suffixes()]
            suffixes = [suffix for suffix in known if request.columns.image in (None, suffix)]
            if len(suffixes) > 1:
                several = ", ".join(suffixes)
                raise UserError(
                    f"{tar}: sample {sample} has several images ({several}); image_column names one"
                )
            if not suffixes:
                skipped += [f"{sample}.{suffix}" for suffix in members]
                continue
            info = members[suffixes[0]]
            items.append((str(tar), info.offset_data, info.size, f".{suffixes[0].split('.')[-1]}"))
            names.append(f"{tar}: {info.name}")
            raw += [_label(tar, sample, members, request)] if request.labelled else []
            groups += [_group(tar, sample, members, group)] if group is not None else []
    if not items:
        raise UserError(f"{path}: holds no image")
    numbers, classes = labels.none(len(items))
    if request.labelled:
        numbers, classes = labels.numbered(np.array(raw), None, str(path), request.known)
    skipped += files.others(path, {str(tar) for tar in tars}, "test")
    source = Source(items, opened, names, numbers, classes, notes=files.notes(str(path), names, skipped))
    if group is None:
        return source
    if _is_in_name(group):
        return grouped_by_path(source, [PurePosixPath(name) for name in groups], group, path)
    return with_groups(source, groups, str(path))


def _tars(folder: Path, split: str) -> list[Path]:
    """The tars of a split, where their names say it."""
    found = {one: sorted(folder.glob(f"*{one}*.tar")) for one in ("train", "test")}
    return found[split]


def _samples(tar: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Names of samples, and their files by what follows the first dot of a name."""
    sample, members = "", dict[str, tarfile.TarInfo]()
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                folder, _, name = info.name.rpartition("/")
                if not info.isfile() or any(map(files.is_hidden, info.name.removeprefix("./").split("/"))):
                    continue
                stem, _, suffix = name.partition(".")
                key = f"{folder}/{stem}"
                if key != sample and members:
                    yield sample, members
                    members = {}
                sample = key
                members[suffix.lower()] = info
    except tarfile.TarError as error:
        hint = "; packed tars are not read, unpack it" if tar.suffix != ".tar" else ""
        raise UserError(f"{tar}: not readable as a tar ({error}){hint}") from None
    if members:
        yield sample, members


def _label(tar: Path, sample: str, members: dict[str, tarfile.TarInfo], request: Request) -> str:
    field = request.columns.label
    for suffix in ("cls", "txt") if field is None else ():
        if suffix in members:
            return _content(tar, members[suffix]).decode(errors="replace").strip()
    if "json" in members:
        try:
            found = json.loads(_content(tar, members["json"]))
            names = LABELS if field is None else (field,)
            return str(next(found[name] for name in names if name in found))
        except (ValueError, TypeError, StopIteration):
            pass
    wanted = f"field {field!r} in its .json" if field else ".cls, .txt or field 'label' in its .json"
    folders = (
        "; a tar of a folder for each class is not read: unpack it" if sample.strip("/.").count("/") else ""
    )
    raise UserError(f"{tar}: sample {sample.strip('/')} has no label: no {wanted}{folders}")


def _group(tar: Path, sample: str, members: dict[str, tarfile.TarInfo], group: str) -> str:
    """What names the group of a sample: itself, or the field `group` of its .json."""
    if _is_in_name(group):
        return sample.removeprefix("/")
    try:
        return str(json.loads(_content(tar, members["json"]))[group])
    except (ValueError, TypeError, KeyError):
        where = f"{tar}: sample {sample.strip('/')} has no field {group!r} in its .json"
        raise UserError(
            f"{KEY}: {where}; a regular expression on the names of samples has a (group)"
        ) from None


def _is_in_name(group: str) -> bool:
    """Whether it is a level of folders or a regular expression: one with a parenthesis, which fields lack."""
    return group.isdecimal() or "(" in group


def _content(tar: Path, info: tarfile.TarInfo) -> bytes:
    with open(tar, "rb") as file:
        file.seek(info.offset_data)
        return file.read(info.size)


def opened(item: tuple[str, int, int, str]) -> Image.Image:
    """An image by its place in a tar."""
    path, start, size, suffix = item
    with open(path, "rb") as file:
        file.seek(start)
        return files.open_image(BytesIO(file.read(size)), suffix)
