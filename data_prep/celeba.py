"""CelebA, all aligned faces of 178x218 or of half that size, to a .beton of RGB images in one class.

The folder holds the *.jpg, or img_align_celeba/ or celeba/img_align_celeba/ with them. The usual centre crop
of 140x140 (70x70 of half-size faces), antialiased resize.
"""

from _common import main

if __name__ == "__main__":
    main("celeba", __doc__, channels=3, resolutions=(32, 64), default=32, labelled=False)
