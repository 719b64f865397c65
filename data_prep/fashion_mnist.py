"""Fashion-MNIST as torchvision keeps it (fetched where it is not there) to a .beton of 28x28 grey images."""

from _common import main

if __name__ == "__main__":
    main("fashion-mnist", __doc__, channels=1, default=28)
