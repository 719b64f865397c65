"""Image sets as a list of files with labels: CSV (with a header), or JSON lines."""

import csv
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from privimage.data import files, labels
from privimage.data.arrays import with_groups
from privimage.data.decode import Source
from privimage.data.request import Request, column
from privimage.errors import UserError

IMAGES = ("path", "file_name", "filename", "file", "image", "image_path")
LABELS = ("label", "class", "target")
SEPARATORS = ",;\t"


def read_csv(request: Request) -> Source:
    """A table of paths, seen from the folder of the file, and labels.

    Its columns are separated by comma, semicolon or tab. Raises UserError for whatever is wrong with it.
    """
    path = request.path
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            head = file.readline()
            file.seek(0)
            separator = max(SEPARATORS, key=head.count)
            rows = list(csv.DictReader(file, delimiter=separator, restval=""))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8 ({error})") from None
    if broken := next((number for number, row in enumerate(rows, 2) if None in row), None):
        raise UserError(f"{path}: line {broken} has more cells than the first line")
    return _listed(path, rows, request)


def read_json_lines(request: Request) -> Source:
    """The same with a JSON object a line."""
    path, rows = request.path, []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise UserError(f"{path}: line {number} is not a JSON object") from None
    return _listed(path, rows, request)


def _listed(path: Path, rows: list[dict], request: Request) -> Source:
    if not rows:
        raise UserError(f"{path}: lists no image")
    image = column(path, list(rows[0]), request.columns.image, IMAGES, "image_column")
    listed = [os.path.join(path.parent, str(value)) for value in _values(path, rows, image)]  # noqa: PTH118
    if twice := [name for name, number in Counter(listed).items() if number > 1]:
        raise UserError(f"{path}: lists {twice[0]} twice; an image has one label")
    numbers, classes = labels.none(len(rows))
    if request.labelled:
        label = column(path, list(rows[0]), request.columns.label, LABELS, "label_column")
        raw = np.array([str(value) for value in _values(path, rows, label)])
        numbers, classes = labels.numbered(raw, None, str(path), request.known)
    source = Source(listed, files.open_file, listed, numbers, classes)
    if request.columns.group is not None:
        group = column(path, list(rows[0]), request.columns.group, (), "data.sensitive.group")
        source = with_groups(source, np.array(_values(path, rows, group)), str(path))
    return replace(source, notes=(*_unlisted(path, listed), *files.notes(str(path), listed, ())))


def _values(path: Path, rows: list[dict], column: str) -> list:
    for number, row in enumerate(rows, 1):
        if row.get(column) in (None, ""):
            raise UserError(f"{path}: row {number} has no {column}")
    return [row[column] for row in rows]


def _unlisted(path: Path, listed: list[str]) -> tuple[str, ...]:
    """Images that lie in the folders of the listed ones, and are not in the list."""
    known = set(listed)
    left = [
        place
        for folder in dict.fromkeys(map(os.path.dirname, listed))
        if os.path.isdir(folder)  # noqa: PTH112
        for entry in os.scandir(folder)
        if entry.is_file()
        and not files.is_hidden(entry.name)
        and files.suffix_of(entry.name) in files.suffixes()
        if (place := os.path.join(folder, entry.name)) not in known  # noqa: PTH118
    ]
    if not left:
        return ()
    return (f"{path}: {len(left)} images beside the listed ones are not in the list, first {min(left)}",)
