"""An .npz with images uint8 (N, H, W[, 1 or 3]), labels (N,) and, if wanted, classes (names) to a .beton.

A folder with train.npz and test.npz will do too.
"""

from _common import main

if __name__ == "__main__":
    main("npz", __doc__, channels=3)
