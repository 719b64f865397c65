"""Tar files of PNG images and labels, as WebDataset streams them."""

import io
import tarfile
from pathlib import Path

from privimage.releases.formats.base import Format
from privimage.releases.synthetic import SyntheticSet

SHARD = 10_000  # images in a tar file


def _write(folder: Path, synthetic: SyntheticSet) -> None:
    (folder / "webdataset").mkdir()
    for shard, first in enumerate(range(0, len(synthetic), SHARD)):
        # USTAR, and TarInfo's own defaults: no owner, and the date 0.
        with tarfile.open(
            folder / "webdataset" / f"train-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT
        ) as tar:
            for number in range(first, min(first + SHARD, len(synthetic))):
                label = str(int(synthetic.labels[number])).encode()
                for suffix, content in (("png", synthetic.png(number)), ("cls", label)):
                    entry = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


WEBDATASET = Format(
    title="WebDataset tar files",
    write=_write,
    files=(r"webdataset", r"webdataset/train-\d{6}\.tar"),
    load="from webdataset import WebDataset\n\n"
    'dataset = WebDataset("release/webdataset/train-000000.tar", shardshuffle=False).decode("pil")',
    data_files="webdataset/*.tar",
)
