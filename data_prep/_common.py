"""What the scripts of this folder share.

Arguments, and the way from a set of a kind to a store with its sidecar.
"""

import argparse
import sys
from pathlib import Path

from privimage.data import store
from privimage.data.readers import open_source
from privimage.data.transforms import Form
from privimage.errors import UserError


def main(
    kind: str,
    description: str,
    channels: int,
    resolutions: tuple[int, ...] | None = None,
    default: int | None = None,
    labelled: bool = True,
) -> None:
    """Read the arguments and write the store.

    Ends with status 2 and one line if something is wrong with the input.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="where the set is")
    parser.add_argument(
        "output",
        type=Path,
        help=(
            "the file to write: .beton (JPEGs from 128 pixels a side on), or .npy (always raw), which needs "
            "no FFCV; a sidecar .json is put beside it"
        ),
    )
    parser.add_argument(
        "--resolution",
        type=int,
        choices=resolutions,
        default=default,
        required=default is None,
        help="pixels of a side",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), default=channels, help="1 grey, 3 RGB (default %(default)s)"
    )
    parser.add_argument(
        "--split",
        choices=("train", "test"),
        default="train",
        help="which part of the set (default %(default)s)",
    )
    parser.add_argument(
        "--fit",
        choices=("crop", "pad", "squash"),
        default="crop",
        help="what is done with images that are not square (default %(default)s)",
    )
    parser.add_argument(
        "--window",
        nargs=2,
        type=float,
        metavar=("LOW", "HIGH"),
        help="values of 16-bit and float pixels that become black and white",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that decode (default %(default)s; 0: this one)"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="count images that do not decode and go on, instead of stopping at the first",
    )
    given = parser.parse_args()
    try:
        if given.resolution < 1 or given.workers < 0:
            raise UserError("--resolution must be at least 1, --workers at least 0")
        if given.window and not given.window[0] < given.window[1]:
            raise UserError("--window: the first value must be smaller than the second")
        source = open_source(kind, given.source, given.split, labelled)
        for line in source.notes:
            print(line, file=sys.stderr)
        window = tuple(given.window) if given.window else None
        form = Form(given.resolution, given.channels, given.fit, window=window)
        sidecar = store.write(source, given.output, form, given.workers, given.skip_bad)
    except UserError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print(
        f"{given.output}: {sidecar.count} images {sidecar.shape}, {len(sidecar.classes)} classes, "
        f"{sidecar.size} bytes, sha256 {sidecar.sha256}"
    )
