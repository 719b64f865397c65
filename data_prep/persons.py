"""A set with artificial persons: images dealt out at random, so many to each.

To measure what a promise for persons costs (configs/experiments/persons-*.yaml). Writes train.npz and
test.npz with images, labels, classes, and whom each image belongs to (`person`); no person is in both.
"""

import argparse
from pathlib import Path

import numpy as np

from privimage.data.readers import open_source
from privimage.errors import UserError
from privimage.storage.files import write_arrays


def main() -> None:
    """Read the arguments and write both files; ends with status 2 and one line if something is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the folder to write")
    parser.add_argument(
        "--images", type=int, required=True, help="of a person; what is left over makes one more"
    )
    parser.add_argument(
        "--source", type=Path, help="folder with train.npz and test.npz; default: the UCI digits"
    )
    given = parser.parse_args()
    try:
        if given.images < 1:
            raise UserError(f"--images: {given.images} is less than 1")
        write(given.output, given.images, given.source)
    except (UserError, OSError) as error:
        parser.exit(2, f"{error}\n")


def write(output: Path, images: int, given: Path | None) -> None:
    """Write both files, with so many images of each person but the last."""
    output.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        source = open_source("npz" if given else "digits", given, split)
        # By a fixed seed, so that the same persons are made everywhere.
        dealt = np.random.default_rng(0).permutation(len(source)) // images
        write_arrays(
            output / f"{split}.npz",
            {
                "images": np.asarray(source.items),
                "labels": source.labels,
                "classes": np.array(source.classes),
                "person": np.array([f"{split} {number}" for number in dealt]),
            },
        )


if __name__ == "__main__":
    main()
