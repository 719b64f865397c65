"""Image sets in a zip: with the dataset.json of StyleGAN and EDM, or with a folder for each class."""

import json
import os
import zipfile
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from privimage.data import files, labels
from privimage.data.decode import Source
from privimage.data.path_groups import classes_of_groups, grouped_by_path
from privimage.data.request import ONE_CLASS, Request
from privimage.errors import UserError

LABELS = "dataset.json"


def read(request: Request) -> Source:
    """Labels are those of dataset.json, numbers of classes, or the names of folders; groups are in the paths.

    Raises UserError for what is no zip, has no classes or images, or an image that belongs to no group.
    """
    path = request.path
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a zip file, or damaged")
    with zipfile.ZipFile(path) as archive:
        entries = sorted(name for name in archive.namelist() if not _hidden(name))
        names = [name for name in entries if not name.endswith("/")]
        folders = [name for name in entries if name.endswith("/")]
        described = [name for name in names if PurePosixPath(name).name == LABELS]
        table = _table(archive, described[0], path) if described and request.labelled else None
    known = files.suffixes()
    images = [name for name in names if files.suffix_of(name) in known]
    skipped = [name for name in names if name not in described and files.suffix_of(name) not in known]
    if not images:
        raise UserError(f"{path}: holds no image")
    if not request.labelled:
        source = _source(path, images, np.zeros(len(images), np.int64), ONE_CLASS)
    elif table is not None:
        source = _described(path, images, table, PurePosixPath(described[0]).parent, request)
    else:
        source = _foldered(path, images, folders, request)
    if (group := request.columns.group) is not None:
        source = grouped_by_path(source, [PurePosixPath(name) for _, name in source.items], group, path)
    return replace(source, notes=(*source.notes, *files.notes(str(path), images, skipped)))


def _hidden(name: str) -> bool:
    return any(map(files.is_hidden, PurePosixPath(name).parts))


def _source(path: Path, images: list[str], numbers: np.ndarray, classes: tuple[str, ...]) -> Source:
    items = [(str(path), name) for name in images]
    return Source(items, opened, [f"{path}: {name}" for name in images], numbers, classes)


def _described(path: Path, images: list[str], table: dict, root: PurePosixPath, request: Request) -> Source:
    """Labels from dataset.json, which must have one for each image and no other."""
    place = {str(PurePosixPath(root, name)): label for name, label in table.items()}
    for name in images:
        if name not in place:
            raise UserError(f"{path}: {LABELS} has no label for {name}")
    there = set(images)
    if gone := next((name for name in place if name not in there), None):
        raise UserError(f"{path}: {LABELS} has a label for {gone}, which is not there")
    try:
        raw = np.array([place[name] for name in images])
    except ValueError:
        raise UserError(f"{path}: the labels of {LABELS} are not of one kind") from None
    return _source(path, images, *labels.numbered(raw, None, str(path), request.known))


def _foldered(path: Path, images: list[str], folders: list[str], request: Request) -> Source:
    """Classes are the folders at the top, or those inside of the only folder there, or of each group's."""
    parts = [PurePosixPath(name).parts for name in images]
    depth = 0
    while len({part[depth] for part in parts}) == 1 and all(len(part) > depth + 2 for part in parts):
        depth += 1
    above = request.columns.group == str(depth + 1)
    depth += above
    inside = [index for index, part in enumerate(parts) if len(part) > depth + 1]
    if not inside:
        raise UserError(
            f"{path}: neither a {LABELS} nor a folder for each class; a set without labels is read with "
            "labelled: false"
        )
    beside = len(parts) - len(inside)
    notes = (f"{path}: {beside} images beside the folders of the classes skipped",) if beside else ()
    raw = np.array([parts[index][depth] for index in inside])
    classes = _classes(path, set(raw.tolist()), folders, depth, request, above)
    numbers, classes = labels.numbered(raw, classes, str(path), request.known)
    return replace(_source(path, [images[index] for index in inside], numbers, classes), notes=notes)


def _classes(
    path: Path, used: set[str], folders: list[str], depth: int, request: Request, above: bool
) -> tuple | None:
    """Classes by the names of folders; in a sensitive set only where folders have entries of their own.

    Otherwise the only image of a class would decide whether the class exists. With groups `above` them each
    group must have an entry for each class.
    """
    if request.known is None:
        return tuple(sorted(used))
    if request.known.names is not None:
        return None
    parts = [part for name in folders if len(part := PurePosixPath(name).parts) == depth + 1]
    own = {part[depth] for part in parts}
    if used - own:
        raise UserError(
            f"data.sensitive.classes: needed as a list of names, since {path} has no entries for its folders"
        )
    of_groups: dict[str, set[str]] = {}
    for part in parts if above else ():
        of_groups.setdefault(f"{path}: {part[depth - 1]}", set()).add(part[depth])
    return classes_of_groups(of_groups) if above else tuple(sorted(own))


def _table(archive: zipfile.ZipFile, name: str, path: Path) -> dict | None:
    """Labels by the names of images; None where the file says that there are none."""
    try:
        pairs = json.loads(archive.read(name)).get("labels")
        return None if pairs is None else dict(pairs)
    except (ValueError, TypeError, AttributeError, zipfile.BadZipFile):
        raise UserError(f'{path}: {name} is damaged; it is {{"labels": [["NAME", CLASS], ...]}}') from None


def opened(item: tuple[str, str]) -> Image.Image:
    """An image of an archive."""
    path, name = item
    content = _archive(path, os.stat(path).st_mtime_ns).read(name)  # noqa: PTH116
    return files.open_image(BytesIO(content), files.suffix_of(name))


@lru_cache(maxsize=2)
def _archive(path: str, modified_ns: int) -> zipfile.ZipFile:
    """An archive, whose directory each process reads once."""
    return zipfile.ZipFile(path)
