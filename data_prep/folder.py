"""A folder with a sub-folder of images for each class to a .beton.

Centre crop of the shorter side, antialiased resize.
"""

from _common import main

if __name__ == "__main__":
    main("folder", __doc__, channels=3)
