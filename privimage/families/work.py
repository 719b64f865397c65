"""Estimates of the work of a stage, from a short measurement."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from privimage.distributed.microbatch import activations
from privimage.models.benchmark import SIZES, benchmark_classifier
from privimage.models.label_features import LabelFeatures, PublicFeatures, body_of, field_means
from privimage.models.resnet import classifier, resnet9

FEW = 2  # images to begin with: a private step of a large network is slow enough with them
PARAMETER_BYTES = 20  # of training: weights, gradient, two moments and the average in float32
ENOUGH = 0.3  # seconds of a measurement; the overhead of calls is small beside its last part


@dataclass(frozen=True)
class Work:
    """Work of one stage, done by a single rank."""

    stage: str
    steps: int
    images: float  # per step
    seconds: float
    memory: float  # bytes


def seconds_of_a_pass(
    forward: Callable[[int], Tensor], device: torch.device, precision: str, at_once: int
) -> float:
    """Seconds per image of a forward pass, from images on `device` to a tensor of any shape.

    `forward(n)` is one pass of n images on `device`, in `precision`, "fp32" or "bf16".
    """
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return seconds_an_image(forward, min(FEW, at_once), at_once)


@lru_cache
def classifier_pass(
    network: str, shape: tuple[int, int, int], classes: int, device: torch.device, precision: str
) -> tuple[float, float]:
    """Seconds of a forward pass of a classifier per image, and bytes of its activations.

    `network` is one of `query.network`, "cnn", or of `evaluate.benchmark` as "small resnet"; `shape` is
    (C, H, W).
    """
    size, _, name = network.partition(" ")
    if size in SIZES:
        model = benchmark_classifier(name, SIZES[size][name], shape[0], classes)
    elif network == "cnn":
        model = resnet9(shape[0], classes, shape[1])
    else:
        model = classifier(network, shape[0], classes)
    model = model.to(device)

    def forward(images: int) -> Tensor:
        return model(torch.zeros(images, *shape, device=device))

    return seconds_of_a_pass(forward, device, precision, 128), activations(forward, device, precision)


@lru_cache
def label_features_pass(
    network: str | None, shape: tuple[int, int, int], device: torch.device, precision: str
) -> float:
    """Seconds per image (C, H, W) of what a private classifier sees of it; `network` is that of the query."""
    public = None
    if network is not None:
        body = body_of(network, shape[0])
        public = PublicFeatures.of(network, body, field_means(body, torch.zeros(1, *shape)))
    features = LabelFeatures(shape, device, public)

    def forward(images: int) -> Tensor:
        return features(torch.zeros(images, *shape, device=device))

    return seconds_of_a_pass(forward, device, precision, 128)


def seconds_an_image(run: Callable[[int], Tensor], images: int, at_once: int, patience: float = 1.0) -> float:
    """Seconds of `run(n)` divided by n; n grows from `images` to `at_once`, as far as it can be measured in
    `patience` times `ENOUGH`.
    """
    # One thread waits for nobody, whatever else the machine does.
    with threads(1):
        found, largest = _growing(run, images, at_once, patience * ENOUGH)
    several = torch.get_num_threads()
    if not threads_help(several):
        return found
    # As many images for each as that thread had take as long, where cores are idle. Once: all is set up.
    together = min(several * largest, at_once)
    return min(found, _seconds(run, together) / together)


@lru_cache
def threads_help(count: int) -> bool:
    """Whether `count` threads are faster than one at present, by a few convolutions.

    On cores that other work has, threads wait for each other far longer than they work
    (`benchmarks/busy.py`), above all in short operations.
    """
    if count == 1:
        return False
    kernel = torch.full((32, 32, 3, 3), 1e-3)

    def layers(images: int) -> Tensor:
        maps = torch.ones(images, 32, 16, 16)
        for _ in range(5):
            maps = F.silu(F.conv2d(maps, kernel, padding=1))
        return maps

    alone, together = [], []
    # In turn: what other work takes, it takes from both. The best of three: the first sets things up.
    for _ in range(3):
        with threads(1):
            alone.append(_seconds(layers, 16))
        with threads(count):
            together.append(_seconds(layers, 16))
    return min(together) < min(alone)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's operations by `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _growing(run: Callable[[int], Tensor], images: int, at_once: int, enough: float) -> tuple[float, int]:
    """Seconds of an image, and how many there were of them in the last call."""
    started = time.perf_counter()
    while True:
        found = _best(run, images)
        # As many as there is time for; a part that is little larger would say the same again.
        left = enough - (time.perf_counter() - started)
        more = min(at_once, int(left / max(2 * found, 1e-9)))
        if more < min(2 * images, at_once) or more == images:
            return found, images
        images = more


def _best(run: Callable[[int], Tensor], images: int) -> float:
    """The better of two: the first call sets things up, and other work on the machine only adds time."""
    return min(_seconds(run, images) for _ in range(2)) / images


def _seconds(run: Callable[[int], Tensor], images: int) -> float:
    start = time.perf_counter()
    run(images).sum().item()
    return time.perf_counter() - start
