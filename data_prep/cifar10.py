"""CIFAR-10 as torchvision keeps it (fetched where it is not there) to a .beton of 32x32 RGB images."""

from _common import main

if __name__ == "__main__":
    main("cifar10", __doc__, channels=3, default=32)
