"""Parquet in the layout of Hugging Face `datasets`: images as PNG files, labels with the names of classes."""

import importlib.util
import json
from pathlib import Path

from privimage.releases.formats.base import Format
from privimage.releases.synthetic import SyntheticSet

SHARD_BYTES = 500_000_000  # of pixels in a file: what the hub recommends
GROUP = 1000  # images in a row group, which readers hold in memory


def _write(folder: Path, synthetic: SyntheticSet) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    # The features are stated in the file, so that labels have their names in any program that reads it.
    label = {"names": list(synthetic.classes), "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64())], metadata={"huggingface": json.dumps(features)}
    )
    (folder / "data").mkdir()
    size = max(1, SHARD_BYTES // max(1, synthetic.images[0].nbytes))
    starts = range(0, len(synthetic), size)
    for shard, first in enumerate(starts):
        path = folder / "data" / f"train-{shard:05d}-of-{len(starts):05d}.parquet"
        last = min(first + size, len(synthetic))
        with pq.ParquetWriter(path, schema) as writer:
            for start in range(first, last, GROUP):
                rows = range(start, min(start + GROUP, last))
                images = [{"bytes": synthetic.png(row), "path": f"{row:06d}.png"} for row in rows]
                labels = [int(synthetic.labels[row]) for row in rows]
                writer.write_table(pa.table({"image": images, "label": labels}, schema=schema))


def _missing() -> str:
    return "" if importlib.util.find_spec("pyarrow") else "pyarrow; pip install 'privimage[parquet]'"


PARQUET = Format(
    title="Parquet, as Hugging Face datasets has it",
    write=_write,
    files=(r"data", r"data/train-\d{5}-of-\d{5}\.parquet"),
    load='from datasets import load_dataset\n\ndataset = load_dataset("release", split="train")',
    missing=_missing,
    data_files="data/*.parquet",
)
