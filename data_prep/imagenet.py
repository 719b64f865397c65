"""ImageNet or a set laid out like it (CLASS/*.jpg or train/CLASS/*.jpg) to a .beton of 32x32 or 64x64 RGB
images.

Centre crop of the shorter side, antialiased resize; the class index is the place of the folder in
alphabetical order, as usual.
"""

from _common import main

if __name__ == "__main__":
    main("folder", __doc__, channels=3, resolutions=(32, 64), default=32)
