"""What a format of a release is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from privimage.releases.synthetic import SyntheticSet


@dataclass(frozen=True)
class Format:
    """One format in which a synthetic set can be written.

    `write` adds files to the folder of a release; equal sets give equal bytes. `files` are regular
    expressions of all paths that it may write, relative to that folder. `load` are the two lines of Python
    that read it again, where the release lies in the folder `release`.
    """

    title: str
    write: Callable[[Path, SyntheticSet], None]
    files: tuple[str, ...]
    load: str
    missing: Callable[[], str] = str  # what `write` needs that is not installed; empty if nothing is
    data_files: str = (
        ""  # the pattern by which the hub and `datasets` find the files; none: they cannot read them
    )
