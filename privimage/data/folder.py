"""Image sets as folders, with a sub-folder for each class."""

from pathlib import Path

import numpy as np

from privimage.data import files
from privimage.data.decode import Source
from privimage.data.request import Request, part
from privimage.errors import UserError

# Files in place of a folder, by the ending of their names, and the kind that reads them.
KINDS = {
    ".beton": "beton",
    ".csv": "csv",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".jsonl": "jsonl",
    ".npz": "npz",
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".zip": "zip",
}


def read(request: Request) -> Source:
    """Classes are the sub-folders, in the order of their names; without labels, all images below the folder.

    A class without an image is allowed where classes are declared (sensitive sets). Files that are no images
    are counted, and so are those beside the sub-folders. Raises UserError for a path that is no folder, and
    for one without classes or images.
    """
    root = part(request)
    if not root.is_dir():
        raise UserError(f"{root}: expected a folder of images, not a file{_hint(root)}")
    entries = sorted(entry for entry in root.iterdir() if not files.is_hidden(entry.name))
    folders = [entry for entry in entries if entry.is_dir()] if request.labelled else [root]
    if not folders:
        raise UserError(
            f"{root}: expected a sub-folder of images for each class; a set without classes is read with "
            "labelled: false"
        )
    images: list[str] = []
    labels: list[int] = []
    skipped: list[str] = []
    for label, folder in enumerate(folders):
        found: list[str] = []
        for path in files.below(folder):
            (found if files.is_image(path) else skipped).append(path)
        if not found and request.labelled and request.known is None:
            raise UserError(f"{folder}: class {folder.name!r} has no image{_kinds(skipped)}")
        images += found
        labels += [label] * len(found)
    if not images:
        raise UserError(f"{root}: holds no image{_kinds(skipped)}")
    beside = [str(entry) for entry in entries if request.labelled and not entry.is_dir()]
    classes = tuple(folder.name for folder in folders)
    told = (
        *_other_parts(request),
        *_beside(root, beside),
        *files.notes(str(root), images, skipped),
    )
    return Source(images, files.open_file, images, np.array(labels), classes, notes=told)


def _other_parts(request: Request) -> tuple[str, ...]:
    """What lies beside train/ and test/, where there are these."""
    path = request.path
    if part(request) == path:
        return ()
    others = [entry for entry in path.iterdir() if not files.is_hidden(entry.name)]
    others = [entry for entry in others if entry.name not in ("train", "test")]
    lost = [file for entry in others for file in (files.below(entry) if entry.is_dir() else [str(entry)])]
    return files.notes(str(path), (), lost)


def _beside(root: Path, beside: list[str]) -> tuple[str, ...]:
    """Files that lie beside the sub-folders belong to no class."""
    if not beside:
        return ()
    lost = [path for path in beside if files.is_image(path)]
    text = f"{root}: {len(beside)} file{'s' if len(beside) > 1 else ''} beside the class folders"
    first = f"{len(lost)} of them images, the first {Path(lost[0]).name}" if lost else "none of them images"
    return (f"{text} skipped, {first}",)


def _kinds(skipped: list[str]) -> str:
    found = files.notes("", (), skipped)
    return f" ({found[0].removeprefix(': ')})" if found else ""


def _hint(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix == ".npy":
        stored = path.with_name(f"{path.name}.json").exists()
        return "; kind beton reads it" if stored else "; save its array in an npz, as images, with labels"
    if suffix in (".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"):
        return "; unpack it, or pack it as .zip or .tar"
    return f"; kind {KINDS[suffix]} reads it" if suffix in KINDS else ""
