"""Image sets in Parquet files, and in folders of the `datasets` library (which are Arrow files)."""

import json
import os
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from privimage.data import files, labels
from privimage.data.arrays import with_groups
from privimage.data.decode import Source
from privimage.data.request import Request, column
from privimage.errors import UserError

IMAGES = ("image", "img", "images")
LABELS = ("label", "labels")
Item = tuple[str, str, int, int]  # file, column, row group or batch, row in it


def holds_test_split(path: Path) -> bool:
    """Whether a folder has files of held-out images."""
    return path.is_dir() and bool(_of_split(path, "test"))


def read(request: Request) -> Source:
    """A file, or all of a folder; a column of images (bytes, or bytes and path) and one of labels.

    The split is in the names of files or folders, as the `datasets` library writes them, and class names are
    in the schema. Images stay in the files until they are decoded. Raises UserError for damaged files,
    missing columns, and where pyarrow is missing.
    """
    path, columns = request.path, request.columns
    try:
        import pyarrow
    except ImportError:
        reason = "needs pyarrow, which is not installed; pip install 'privimage[parquet]'"
        raise UserError(f"{path}: {reason}") from None
    items: list[Item] = []
    raw: list[np.ndarray] = []
    groups: list[np.ndarray] = []
    names: tuple[str, ...] | None = None
    for file in _files(request):
        try:
            table = _Rows(str(file))
            image = column(file, table.columns, columns.image, IMAGES, "image_column")
            items += [
                (str(file), image, part, row)
                for part, count in enumerate(table.counts())
                for row in range(count)
            ]
            if request.labelled:
                label = column(file, table.columns, columns.label, LABELS, "label_column")
                raw.append(_numpy(table.whole(label), file, label))
                names = _class_names(table.schema, label)
            if columns.group is not None:
                group = column(file, table.columns, columns.group, (), "data.sensitive.group")
                groups.append(_numpy(table.whole(group), file, group))
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file}: not readable ({str(error).splitlines()[0]})") from None
    if not items:
        raise UserError(f"{path}: holds no image")
    numbers, classes = labels.none(len(items))
    if request.labelled:
        numbers, classes = labels.numbered(np.concatenate(raw), names, str(path), request.known)
    texts = [f"{file}: {column}, row {row} of part {part}" for file, column, part, row in items]
    skipped = files.others(path, {item[0] for item in items}, "test")
    source = Source(items, opened, texts, numbers, classes, notes=files.notes(str(path), (), skipped))
    return with_groups(source, np.concatenate(groups), str(path)) if groups else source


def _files(request: Request) -> list[Path]:
    path = request.path
    if path.is_file():
        if path.suffix not in (".parquet", ".arrow"):
            raise UserError(f"{path}: expected a .parquet or .arrow file, or a folder of them")
        return [path]
    if found := _of_split(path, request.split):
        return found
    if request.split == "test":
        reason = "has no test split; name the held-out images in data.sensitive.test_path"
        raise UserError(f"{path}: {reason}")
    found = _data_files(path)
    if not found:
        raise UserError(f"{path}: holds no .parquet and no .arrow")
    return found


def _data_files(folder: Path) -> list[Path]:
    kinds = {kind: sorted(folder.rglob(f"*{kind}")) for kind in (".parquet", ".arrow")}
    found = kinds[".parquet"] or kinds[".arrow"]
    return [file for file in found if not any(map(files.is_hidden, file.relative_to(folder).parts))]


def _of_split(folder: Path, split: str) -> list[Path]:
    """Files whose name, or whose folder, begins with the split."""
    return [
        file
        for file in _data_files(folder)
        if any(part.startswith(split) for part in file.relative_to(folder).parts)
    ]


class _Rows:
    """The rows of a file by row groups (Parquet) or record batches (Arrow)."""

    def __init__(self, path: str):
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.arrow = not path.endswith(".parquet")
        if self.arrow:
            with pa.memory_map(path) as file:
                self.batches = pa.ipc.open_stream(file).read_all().to_batches()
            self.schema = self.batches[0].schema if self.batches else pa.schema([])
        else:
            self.file = pq.ParquetFile(path)
            self.schema = self.file.schema_arrow
        self.columns = list(self.schema.names)

    def counts(self) -> list[int]:
        """The number of rows of each part."""
        if self.arrow:
            return [batch.num_rows for batch in self.batches]
        return [self.file.metadata.row_group(part).num_rows for part in range(self.file.num_row_groups)]

    def part(self, part: int, column: str) -> Any:
        """A column of a part."""
        if self.arrow:
            return self.batches[part].column(column)
        return self.file.read_row_group(part, columns=[column]).column(column)

    def whole(self, column: str) -> Any:
        """A column as a list."""
        return [value for part in range(len(self.counts())) for value in self.part(part, column).to_pylist()]


def _numpy(values: list, file: Path, column: str) -> np.ndarray:
    if any(value is None for value in values):
        raise UserError(f"{file}: row {values.index(None)} has no {column}")
    return np.array(values)


def _class_names(schema: Any, label: str) -> tuple[str, ...] | None:
    """The names that the `datasets` library has left in the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def opened(item: Item) -> Image.Image:
    """An image of a file."""
    path, column, part, row = item
    cell = _part(path, os.stat(path).st_mtime_ns, column, part)[row].as_py()  # noqa: PTH116
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if isinstance(content, bytes):
        return files.open_image(BytesIO(content), "")
    place = cell.get("path") if isinstance(cell, dict) else cell
    if isinstance(place, str):
        return Image.open(Path(path).parent / place)
    raise UserError(f"column {column!r} has no images: their bytes, or bytes and path, are needed")


@lru_cache(maxsize=1)
def _part(path: str, modified_ns: int, column: str, part: int) -> Any:
    """The images of a row group, which are decoded one after the other."""
    return _rows(path, modified_ns).part(part, column)


@lru_cache(maxsize=2)
def _rows(path: str, modified_ns: int) -> _Rows:
    return _Rows(path)
