"""PNG files in a folder for each class, as torchvision's ImageFolder and many tools read them."""

import re
from pathlib import Path

from privimage.releases.formats.base import Format
from privimage.releases.synthetic import SyntheticSet

UNSAFE = r'[\x00-\x1f"*/:<>?\\|%]|^[. ]|[. ]$'  # in names of folders, on one system or another


def folder_name(name: str) -> str:
    """The name of a class as that of a folder: what a file system may refuse is written %XX, as in URLs."""
    return re.sub(UNSAFE, lambda found: f"%{ord(found.group()):02X}", name) or "%"


def _write(folder: Path, synthetic: SyntheticSet) -> None:
    for number, label in enumerate(synthetic.labels):
        path = folder / "images" / folder_name(synthetic.classes[label]) / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(synthetic.png(number))


PNG = Format(
    title="PNG files, a folder for each class",
    write=_write,
    files=(r"images", r"images/[^/]+", r"images/[^/]+/\d{6,}\.png"),
    load="from torchvision.datasets import ImageFolder\n\n"
    'dataset = ImageFolder("release/images")  # classes in alphabetical order',
    data_files="images/*/*.png",
)
