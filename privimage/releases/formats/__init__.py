"""The formats of a release beside synthetic.npz. A new one is one file, one line here and its name in
`privimage.config.results`.
"""

from privimage.releases.formats.base import Format
from privimage.releases.formats.beton import BETON
from privimage.releases.formats.parquet import PARQUET
from privimage.releases.formats.png import PNG
from privimage.releases.formats.webdataset import WEBDATASET

# In the order in which a data card prefers them.
FORMATS: dict[str, Format] = {"parquet": PARQUET, "png": PNG, "webdataset": WEBDATASET, "beton": BETON}

__all__ = ["FORMATS", "Format"]
