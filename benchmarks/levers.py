"""Ways to take the private steps, each alone at equal cost, against the steps as they are.

    python benchmarks/levers.py [CONFIG] [section.key=value ...] [--only NAME ...] [--seeds 1] [--dir DIR]

Public stages of CONFIG (default: configs/quickstart.yaml) run once, in DIR. Then each lever takes the private
steps that are planned for the promise of CONFIG: the same clipping bound and number of gradients, the noise
that the promise needs, and random numbers that are equal for all levers of a seed. Nothing is charged and no
key is secret: for public sets only. Settings are chosen by it, so it is not for a set that results are about.

Printed are EDM losses of the averaged weights on 1,000 images of the test set: over all noise levels, and
over the lower, middle and upper third of them. "label" is by how many percent the loss rises where an image
is shown with another label: what the network has learned of classes. "pixels" is the accuracy on these images
of logistic regression that has learned from 1,000 samples with the labels that were asked for.
"""

import argparse
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from privimage.config import Config, load
from privimage.data.sensitive import ImageDraws, SensitiveSet, residence
from privimage.data.sources import open_sensitive
from privimage.distributed.world import ALONE
from privimage.evaluation.utility import Labelled, logistic_regression, percent
from privimage.families import finetuned_family
from privimage.families.denoising import DenoisingLosses, DiffusionPrivate
from privimage.models import build_diffusion, edm
from privimage.models.ema import EMA
from privimage.privacy.gradients import FoldedGradients, clip_and_sum_, trained_parameters
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.plan import make_plan
from privimage.recipes import settled
from privimage.runs import pipeline
from privimage.stages.training import weights_of
from privimage.storage.rundir import RunDir

HELD_OUT, LEVELS, SAMPLES, PHYSICAL = 1000, 9, 1000, 64


@dataclass(frozen=True)
class Lever:
    """What is done otherwise; all that is left out is as `privimage finetune` does it."""

    rate: float = 1.0  # times the learning rate
    label_rate: float = 1.0  # times that rate, of the embedding of labels
    second: float = 0.0  # of the noise's variance, the floor of DP-AdamBC's second moment; 0: Adam
    dropout: float | None = None  # of labels
    levels: tuple[float, float] = edm.LEVELS  # mean and deviation of ln sigma
    shift: int = 0  # pixels by which copies of an image are moved at most
    mirror: bool = False  # half of the copies are mirrored
    trained: tuple[str, ...] = ()  # parts of names of parameters that are trained; () is all
    decay: float | None = None  # of the averaged weights
    steps: float = 1.0  # times the number of steps, with batches that much smaller, and noise for them


LEVERS = {
    "as it is": Lever(),
    "half the rate": Lever(rate=0.5),
    "twice the rate": Lever(rate=2.0),
    "DP-AdamBC, floor 0.1": Lever(second=0.1, rate=0.3),
    "DP-AdamBC, floor 1": Lever(second=1.0),
    "no label dropout": Lever(dropout=0.0),
    "labels at 5 times the rate": Lever(label_rate=5.0),
    "higher levels": Lever(levels=(-0.6, 1.2)),
    "lower levels": Lever(levels=(-1.8, 1.2)),
    "narrower levels": Lever(levels=(-1.2, 0.8)),
    "copies moved by 1": Lever(shift=1),
    "copies mirrored": Lever(mirror=True),
    "attention, lowest level, labels": Lever(trained=("attention", "label", "middle")),
    "decay 0.9": Lever(decay=0.9),
    "decay 0.97": Lever(decay=0.97),
    "four times the steps": Lever(steps=4.0, rate=0.5),
    "a quarter of the steps": Lever(steps=0.25, rate=2.0),
}


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--only", nargs="*", choices=list(LEVERS), default=list(LEVERS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=Path("runs/levers"))
    args = parser.parse_args()
    config = load(args.config, [*args.overrides, f"run.dir={args.dir}"])
    stages = [name for name in ("prepare", "query", "select", "pretrain") if name in config.stages]
    assert pipeline.run(config, stages) == 0
    # The pipeline saves its state at a signal; here there is none.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    print("| lever | seed | loss | lower | middle | upper | label | pixels |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    config = settled(config, ALONE, RunDir(args.dir))
    for seed in range(1, args.seeds + 1):
        for name in args.only:
            print("|", " | ".join([name, str(seed), *row(config, LEVERS[name], seed)]), "|", flush=True)


def row(config: Config, lever: Lever, seed: int) -> list[str]:
    """What one lever comes to."""
    run = RunDir(config.run.dir)
    train = open_sensitive(config, "train", ALONE, run.sensitive)
    test = open_sensitive(config, "test", ALONE, run.sensitive)
    images = torch.from_numpy(test.images[: min(HELD_OUT, test.count)])
    labels = torch.from_numpy(test.labels[: len(images)])
    averaged = trained(config, lever, seed, run, train)
    thirds, risen = losses(averaged, edm.to_unit(images), labels, len(train.classes))
    asked = torch.arange(SAMPLES) % len(train.classes)
    sampled = torch.cat(
        [
            finetuned_family(config).sample(config, averaged, part, index, ImageDraws(torch.device("cpu")))
            for part, index in zip(asked.split(250), torch.arange(SAMPLES).split(250), strict=True)
        ]
    )
    right = percent(
        logistic_regression(
            Labelled(sampled.numpy(), asked.numpy()), Labelled(images.numpy(), labels.numpy()), 0
        ),
        labels.numpy(),
    )
    cells = [f"{sum(thirds) / 3:.4f}", *(f"{third:.4f}" for third in thirds)]
    return [*cells, f"{risen:.1f} %", f"{right:.1f} %"]


def trained(config: Config, lever: Lever, seed: int, run: RunDir, train) -> torch.nn.Module:
    """The averaged network after the private steps of a lever."""
    torch.manual_seed(seed)
    config = _of(config, lever, train.count)
    plan = make_plan(config, train.count).the(DPSGD)
    # A loop of its own: `PrivateSteps` names each step by the weights, so that levers would differ in their
    # samples and noise too.
    weights, _ = weights_of(config.finetuned_from, run, ALONE)
    training = finetuned_family(config).private_training(config, len(train.classes), ALONE, weights)
    assert isinstance(training, DiffusionPrivate)
    for name, parameter in training.module.named_parameters():
        parameter.requires_grad_(not lever.trained or any(part in name for part in lever.trained))
    parameters = trained_parameters(training.module)
    gradients = FoldedGradients(training.module, filled_to=PHYSICAL)
    drawn = _Draws(config, lever, len(train.classes))
    where = residence("memory", train.images, ALONE.device, 1)
    data = SensitiveSet(train.images, train.labels, ALONE.device, where)
    deviation = plan.noise_multiplier * plan.max_grad_norm / plan.logical_batch_size
    update = _Adam(training.module, parameters, lever, config.finetune.learning_rate, deviation)
    ema = EMA(training.module, config.finetune.ema_decay if lever.decay is None else lever.decay)
    for step in range(plan.steps):
        total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64)
        for indices in _batches(train.count, float(plan.sample_rate)):
            images, of_images, at = data.__getitems__(indices)
            gradients.backward(drawn, *drawn.draw(images, of_images, at, seed * 100_000 + step))
            clip_and_sum_(total, parameters, plan.max_grad_norm)
            gradients.clear()
        mean = total.float() / plan.logical_batch_size
        update.step(mean + deviation * torch.randn(len(mean)))
        ema.update()
    module = gradients.detach()
    averaged = build_diffusion(config, len(train.classes))
    averaged.load_state_dict(module.state_dict())
    ema.copy_to(averaged)
    return averaged.eval()


def _of(config: Config, lever: Lever, count: int) -> Config:
    """The configuration with another number of steps, and batches for as many gradients."""
    given = config.finetune
    steps = round(lever.steps * given.steps)
    batch = min(given.logical_batch_size * given.steps // steps, count)
    changed = {"steps": steps, "logical_batch_size": batch}
    return config.model_copy(update={"finetune": given.model_copy(update=changed)})


def _batches(count: int, rate: float) -> Iterator[list[int]]:
    """A Poisson sample, in physical batches."""
    sample = torch.nonzero(torch.rand(count) < rate)[:, 0]
    for part in sample.split(PHYSICAL):
        yield part.tolist()


class _Draws(DenoisingLosses):
    """The losses of `privimage finetune` with a lever's labels, noise levels and copies."""

    def __init__(self, config: Config, lever: Lever, n_classes: int):
        super().__init__(config, ALONE, n_classes)
        self.lever = lever
        if lever.dropout is not None:
            self.label_dropout = lever.dropout

    def draw(self, images: Tensor, labels: Tensor, indices: Tensor, seed: int) -> tuple[Tensor, ...]:
        shown, labels, sigma, noise = super().draw(images, labels, indices, seed)
        (usual, spread), (mean, deviation) = edm.LEVELS, self.lever.levels
        sigma = torch.exp((sigma.log() - usual) / spread * deviation + mean)
        if self.lever.shift or self.lever.mirror:
            shown = torch.stack([self._moved(shown[:, copy], copy) for copy in range(shown.shape[1])], 1)
        return shown, labels, sigma, noise

    def _moved(self, images: Tensor, copy: int) -> Tensor:
        # The first copy of nine is where the image is, the others around it.
        by = self.lever.shift
        y, x = ((copy + 4) % 9 // 3 - 1) * by, ((copy + 4) % 9 % 3 - 1) * by
        if self.lever.mirror and copy % 2:
            images = images.flip(-1)
        side = images.shape[-1]
        wide = F.pad(images, (by, by, by, by), mode="replicate")
        return wide[..., by + y : by + y + side, by + x : by + x + side]


class _Adam:
    """Adam; with `Lever.second` the known variance of the noise is taken off the second moment (DP-AdamBC,
    Tang, Shpilevskiy and Lecuyer 2024), down to a share of it.
    """

    def __init__(self, module, parameters: list, lever: Lever, rate: float, deviation: float):
        self.parameters, self.variance = parameters, deviation**2
        self.floor, self.count = lever.second * self.variance, 0
        self.first = torch.zeros(sum(p.numel() for p in parameters))
        self.square = torch.zeros_like(self.first)
        of_labels = {id(p) for name, p in module.named_parameters() if "label" in name}
        rates = [rate * lever.rate * (lever.label_rate if id(p) in of_labels else 1.0) for p in parameters]
        self.rates = torch.cat(
            [torch.full((p.numel(),), one) for p, one in zip(parameters, rates, strict=True)]
        )

    @torch.no_grad()
    def step(self, gradient: Tensor) -> None:
        """Update by the noised mean gradient (P,)."""
        self.count += 1
        self.first.lerp_(gradient, 0.1)
        self.square.lerp_(gradient.square(), 0.001)
        first, square = self.first / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        if self.floor:
            square = (square - self.variance).clamp(min=self.floor)
        change = self.rates * first / (square.sqrt() + 1e-8)
        for p, part in zip(self.parameters, change.split([p.numel() for p in self.parameters]), strict=True):
            p -= part.view_as(p)


@torch.inference_mode()
def losses(
    averaged: Callable[..., Tensor], images: Tensor, labels: Tensor, n_classes: int
) -> tuple[list[float], float]:
    """Losses by thirds of the noise levels, and by how many percent another label raises them."""
    random = torch.Generator().manual_seed(0)
    others = (labels + 1 + torch.randint(n_classes - 1, labels.shape, generator=random)) % n_classes
    found = []
    for level in range(LEVELS):
        noise = torch.randn(images.shape, generator=random)
        quantile = torch.tensor((level + 0.5) / LEVELS)
        sigma = edm.draw_sigma(math.sqrt(2) * torch.erfinv(2 * quantile - 1)).expand(len(images))
        found.append(
            [float(edm.loss(averaged, images, shown, sigma, noise).mean()) for shown in (labels, others)]
        )
    right, other = torch.tensor(found).T
    third = LEVELS // 3
    thirds = [float(right[start : start + third].mean()) for start in range(0, LEVELS, third)]
    return thirds, 100 * float(other.sum() / right.sum() - 1)


if __name__ == "__main__":
    main()
