"""Classifiers trained on synthetic images and tested on real ones: logistic regression, an MLP and a CNN.

Each accuracy is always reported by itself: taking the best of them on the test set would be selection on the
test set. Whatever is fitted (means, scales, weights) is fitted on the training images alone.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from privimage.distributed.microbatch import block_size, fitting_images, pieces
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped
from privimage.models.edm import to_unit
from privimage.models.resnet import resnet9
from privimage.telemetry.progress import Progress

MLP_IMAGES = 2_000_000  # images that the MLP sees, over all epochs: 40 epochs of 50,000 images
# Of the CNN: the highest learning rate at a batch of 512, in proportion at others, and the share of the steps
# in which it is reached. By accuracy on real images (docs/results.md).
LEARNING_RATE, WARM_UP = 0.4, 0.2


@dataclass(frozen=True)
class Labelled:
    """A set of images uint8 (N, C, H, W) with labels int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Predictions:
    """What a trained classifier says about a set: labels (N,) and penultimate features (N, F)."""

    labels: np.ndarray
    features: np.ndarray


def percent(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of correct labels (N,), in percent."""
    return float(100 * np.mean(predicted == labels))


def confusion(predicted: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts int64 (n_classes, n_classes): rows are true classes, columns predicted ones."""
    return np.bincount(labels * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)


def pixels(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat float32 pixels (N, C H W) for LR and MLP: in [0, 1], minus the mean training image, over one
    number.

    Dividing each pixel by its own deviation would blow up those that hardly ever change, such as the border
    of a digit.
    """
    flat = train.reshape(len(train), -1).astype(np.float32) / 255
    mean = flat.mean(0)
    flat -= mean
    scale = float(flat.std()) or 1.0
    return flat / scale, (test.reshape(len(test), -1).astype(np.float32) / 255 - mean) / scale


def _fit(model: object, train: Labelled, test: Labelled) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning

    if len(np.unique(train.labels)) == 1:  # scikit-learn refuses it; the only thing to say is its name
        return np.full_like(test.labels, train.labels[0])
    # Statistics of the training images only, also for the test images.
    inputs, tests = pixels(train.images, test.images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a fixed amount of work is intended
        model.fit(inputs, train.labels)  # type: ignore[attr-defined]
    return model.predict(tests)  # type: ignore[attr-defined]


def logistic_regression(train: Labelled, test: Labelled, seed: int) -> np.ndarray:
    """Labels (M,) by multinomial logistic regression, L2 with C = 1, at most 200 L-BFGS iterations.

    About a minute for 50,000 images of 3,072 values on one core.
    """
    from sklearn.linear_model import LogisticRegression

    return _fit(LogisticRegression(C=1.0, max_iter=200, random_state=seed), train, test)


def mlp(train: Labelled, test: Labelled, seed: int) -> np.ndarray:
    """Labels (M,) by an MLP with one hidden layer of 100 (ReLU, Adam 1e-3, batch 200, L2 1e-4).

    It sees about two million images, in 20 to 200 epochs, which bounds its time: a few minutes for 50,000
    images of 3,072 values on one core.
    """
    from sklearn.neural_network import MLPClassifier

    epochs = min(200, max(20, MLP_IMAGES // len(train)))
    return _fit(MLPClassifier(hidden_layer_sizes=(100,), max_iter=epochs, random_state=seed), train, test)


SHALLOW: dict[str, Callable[[Labelled, Labelled, int], np.ndarray]] = {"lr": logistic_regression, "mlp": mlp}


@dataclass(frozen=True)
class Training:
    """How a network is trained; `batch_size` is over all ranks, `label` is for messages."""

    epochs: int
    batch_size: int
    flip: bool
    seed: int
    world: World
    label: str = "cnn"
    precision: str = "fp32"  # or "bf16", of forward and backward pass


def train_cnn(train: Labelled, n_classes: int, how: Training) -> nn.Module:
    """Train a ResNet-9 by SGD with Nesterov's momentum of 0.9 and weight decay 5e-4.

    Returns the network of the last epoch, in eval mode. The learning rate rises to 0.4 in a fifth of the
    steps and falls to 0 as a cosine; that is at a batch of 512, and in proportion at others: small sets need
    small batches to get enough steps. All ranks call it together and get the same network. Raises Stopped
    when a stop was requested.
    """
    channels, resolution = train.images.shape[1], train.images.shape[-1]
    with torch.random.fork_rng():
        torch.manual_seed(how.seed)
        network = resnet9(channels, n_classes, resolution).to(how.world.device)
    steps = how.epochs * math.ceil(len(train) / how.batch_size)
    optimizer, schedule = _sgd(list(network.parameters()), how.batch_size, steps)
    return fitted(network, train, how, optimizer, schedule)


def fitted(
    network: nn.Module,
    train: Labelled,
    how: Training,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    after_step: Callable[[], None] = lambda: None,
) -> nn.Module:
    """Train by cross-entropy, and leave the network in eval mode; the schedule counts steps.

    The ranks' gradients are added up: the update is that of the whole batch but for batch-norm statistics.
    All ranks call it together, with the same network. Raises Stopped when a stop was requested.
    """
    world, label, batch_size = how.world, how.label, how.batch_size
    images, labels = (torch.from_numpy(array).to(world.device) for array in (train.images, train.labels))
    parameters = list(network.parameters())
    generator = torch.Generator().manual_seed(how.seed)  # order and flips, equal on all ranks

    own, shape = -(-batch_size // world.size), images.shape[1:]
    at_once = fitting_images(own, shape, network, _loss, how.precision, world, f"evaluate: {label}")
    network.train()
    with Progress(label, total=how.epochs, shown=world.is_main) as bar, torch.random.fork_rng():
        torch.manual_seed(how.seed + world.rank)  # of dropout
        for _ in range(how.epochs):
            loss_sum = torch.zeros(1, device=world.device)
            for batch, mirrored in _batches(len(train), batch_size, how.flip, generator):
                optimizer.zero_grad(set_to_none=True)
                mine, flips = (part[world.rank :: world.size].to(world.device) for part in (batch, mirrored))
                # A rank without images still takes part in the sum of gradients.
                for piece in pieces(len(mine), at_once):
                    which = mine[piece]
                    shown = _mirrored(to_unit(images[which]), flips[piece])
                    with torch.autocast(world.device.type, torch.bfloat16, enabled=how.precision == "bf16"):
                        loss = _loss(network, shown, labels[which])
                    (loss / len(batch)).backward()
                    loss_sum += loss.detach()
                _add_up(parameters, world)
                optimizer.step()
                schedule.step()
                after_step()
                if stop.agreed(world):
                    raise Stopped(f"evaluate: finished measures are kept, {label} begins again")
            bar.advance(loss=f"{float(world.all_reduce_(loss_sum)) / len(train):.3f}")

    _average_statistics(network, world)
    return network.eval()


def _sgd(
    parameters: list[nn.Parameter], batch_size: int, steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and its schedule; the learning rate is in proportion to the batch."""
    rate = LEARNING_RATE * batch_size / 512
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rising = max(1, round(WARM_UP * steps))

    def of_the_rate(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, of_the_rate)


def _loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The sum of the losses of images (B, C, H, W) in [-1, 1]."""
    return F.cross_entropy(network(images), labels, reduction="sum")


def _average_statistics(network: nn.Module, world: World) -> None:
    """Batch-norm statistics are of each rank's share: all ranks go on with their mean."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            world.all_reduce_(buffer).div_(world.size)


def _batches(
    count: int, batch_size: int, flip: bool, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch, in random order: indices (B,) and which of them are flipped (B,)."""
    # Drawn on all ranks alike; each then takes every W-th image of a batch.
    order = torch.randperm(count, generator=generator)
    mirrored = torch.rand(count, generator=generator) < (0.5 if flip else 0.0)
    for start in range(0, count, batch_size):
        batch = order[start : start + batch_size]
        yield batch, mirrored[batch]


def _mirrored(images: Tensor, which: Tensor) -> Tensor:
    """Flip the images (B, C, H, W) marked by `which` (B,) from left to right."""
    return torch.where(which[:, None, None, None], images.flip(-1), images)


def _add_up(parameters: list[nn.Parameter], world: World) -> None:
    """Set each parameter's gradient to the sum over the ranks, with one all-reduce."""
    if world.size == 1:
        return
    # One flat tensor: a collective for each parameter would be all latency.
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = world.all_reduce_(torch.cat([gradient.flatten() for gradient in gradients]))
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


@torch.inference_mode()
def predict(network: nn.Module, images: np.ndarray, device: torch.device) -> Predictions:
    """Labels and penultimate features of images uint8 (N, C, H, W) under a trained CNN."""
    labels, features = [], []
    batch_size = block_size(images.shape, 1000)
    for start in range(0, len(images), batch_size):
        inputs = to_unit(torch.from_numpy(images[start : start + batch_size]).to(device))
        # Features are kept for the pictures of the report, labels for the accuracy.
        hidden = network.features(inputs)  # type: ignore[operator]
        features.append(hidden.float().cpu().numpy())
        labels.append(network.head(hidden).argmax(1).cpu().numpy())  # type: ignore[operator]
    return Predictions(np.concatenate(labels), np.concatenate(features))
