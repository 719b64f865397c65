"""`privimage plan`: what a configuration promises and what it will cost, without touching data."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from rich.console import Console
from rich.table import Table

from privimage.commands.promise import Promise, beginning
from privimage.config import Config
from privimage.distributed.precision import resolved
from privimage.distributed.world import alone
from privimage.families import family
from privimage.families.base import image_shape
from privimage.families.work import Work, threads, threads_help
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.mechanisms import SemanticHistogram, WarmEmbedding
from privimage.privacy.plan import PrivacyPlan, plan_without_noise
from privimage.recipes import settled
from privimage.recipes.cost import work_of
from privimage.recipes.facts import public_size
from privimage.recipes.usefulness import busy, too_little_pretraining, too_little_signal, too_long
from privimage.storage.rundir import RunDir

# Squared length of the mean of feature vectors of a class, about; and the noise of an embedding, in what it
# tells, above which a model is likely to unlearn more by it than it learns.
ALIKE, HOPELESS = 0.3, 5


@dataclass(frozen=True)
class RunPlan:
    """What a run promises and what it will cost; `print` shows it."""

    config: Config
    count: int  # N
    classes: int  # 0 if unlabelled
    promise: Promise | None  # None: the method adds no noise
    parameters: dict[str, int]  # of each network
    work: list[Work]  # of each stage, from a short measurement on `device`
    device: str

    @property
    def set_bytes(self) -> int:
        """Bytes of the decoded sensitive set; with one image for each group where groups are the unit."""
        return self.count * prod(image_shape(self.config))

    @property
    def warnings(self) -> list[str]:
        """What may make the result useless or the promise weak, one line each."""
        time = [*too_little_pretraining(self.config), *too_long(self.config, self.work)]
        time += busy(self.config, self.device)
        if self.promise is None:
            return time
        privacy = self.promise.plan
        found = [*too_little_signal(self.config, self.count, self.classes), *_noise_of_query(self, privacy)]
        return [*found, *_noise_of_embedding(self, privacy), *_large_delta(self, privacy), *time]

    def render(self, console: Console) -> None:
        """Print it on a console of rich."""
        if self.promise is None:
            console.print(f"{self.config.spec.title} adds no noise: its output is [bold]not private[/].")
        else:
            _show_privacy(console, self.count, self.promise)
        for warning in self.warnings:
            console.print(f"[yellow]warning:[/] {warning}")
        if self.work:
            _show_cost(console, self)

    def __str__(self) -> str:
        text = io.StringIO()
        self.render(Console(file=text, width=120, highlight=False))
        return text.getvalue()


def plan_run(config: Config) -> RunPlan:
    """The plan of a run, without touching data. Raises UserError if the promise cannot be kept."""
    # N and classes come from the configuration or from what is known of a public set.
    count, classes = public_size(config)
    # One thread measures sooner where threads wait, and what it measures is what a run has there.
    most = torch.get_num_threads()
    with threads(config.runtime.threads or (most if threads_help(most) else 1)):
        return _planned(config, count, classes)


def _planned(config: Config, count: int, classes: int) -> RunPlan:
    # Time is measured where this runs, which should be the kind of machine that will train.
    device = torch.device("cuda" if config.runtime.device != "cpu" and torch.cuda.is_available() else "cpu")
    # What a run would choose here for settings that are left at `auto`, or has chosen.
    config = settled(config, alone(device), RunDir(config.run.dir))
    if not config.spec.private:
        return RunPlan(config, count, classes, None, *_cost(config, count, classes, device), device.type)
    # Accounting and measurements take about as long as each other, and the latter take one core at first.
    with beginning(config, count) as found:
        cost = _cost(config, count, classes, device)
        return RunPlan(config, count, classes, found(), *cost, device.type)


def _cost(
    config: Config, count: int, classes: int, device: torch.device
) -> tuple[dict[str, int], list[Work]]:
    """The parameters of each network, and the work of each stage."""
    if config.spec.generator == "none":
        return {}, []
    # `auto` settings of the precision are resolved for the machine at hand, as a run would. Noise takes no
    # time, steps and batches do.
    steps = plan_without_noise(config, count)
    work = work_of(resolved(config, alone(device)), steps, count, classes, device)
    return family(config).sizes(config, classes), work


def show(config: Config) -> None:
    """Print what `plan_run` finds."""
    plan_run(config).render(Console(highlight=False))


def _noise_of_query(plan: RunPlan, privacy: PrivacyPlan) -> Iterator[str]:
    if plan.config.spec.pretraining != "selected":
        return
    query = privacy.the(SemanticHistogram)
    votes = plan.count * query.per_image / max(plan.classes, 1)
    # About the largest of many bins' noise against half of the votes of a class.
    if 8 * query.standard_deviation > votes:
        yield (
            f"noise of {query.standard_deviation:.3g} votes per bin is large beside the {votes:.0f} votes of "
            "a sensitive class: the query may choose wrong public classes; a larger select.max_rise makes it "
            "surer"
        )


def _noise_of_embedding(plan: RunPlan, privacy: PrivacyPlan) -> Iterator[str]:
    if "embedding" not in plan.config.warm_starts:
        return
    embedding, rows = privacy.the(WarmEmbedding), max(plan.classes, 1)
    # Squared lengths: of the noise on every number, and of the means of classes times their share of the set.
    noise = rows * embedding.features * (embedding.standard_deviation / plan.count) ** 2
    ratio = noise * rows / ALIKE
    if ratio > HOPELESS:
        yield (
            f"the noise of the warm start's embedding is about {ratio:.0f} times what it tells: it is likely "
            "to make images worse; a larger warm.max_rise or fewer match.features (where they are random) "
            "may help, or leave it out"
        )


def _large_delta(plan: RunPlan, privacy: PrivacyPlan) -> Iterator[str]:
    if privacy.delta >= 1 / plan.count:
        yield (
            f"delta {privacy.delta:g} is not below 1/N = {1 / plan.count:.2g}: revealing one whole "
            f"{plan.config.privacy.unit} would be within the promise"
        )


def _show_privacy(console: Console, count: int, promise: Promise) -> None:
    plan = promise.plan
    units = f"{plan.training.relation}; N = {count:,} {plan.training.relation.unit}s"
    title = f"epsilon {plan.epsilon:g}, delta {plan.delta:.3g}, {units}; used: {plan.accountant.upper()}"
    table = Table(title=title, title_justify="left")
    for column in ("mechanism", "uses", "sample rate", "noise multiplier"):
        table.add_column(column, justify="left" if column == "mechanism" else "right")

    def row(name: str, mechanism: SampledGaussian, noise: float, style: str | None = None) -> None:
        numbers = f"{mechanism.count}", f"{mechanism.sample_rate:.6g}", f"{noise:.4g}"
        table.add_row(name, *numbers, style=style)

    # One row per mechanism, then the training's noise if the others were free.
    for used in plan.mechanisms:
        row(used.name, used.composition, used.noise_multiplier)
    spent, training = f"spent by {plan.accountant.upper()}: epsilon {promise.spent:.4f}", plan.training
    for name, other in promise.others.items():
        spent += f" (the same noise by {name.upper()}: {other:.4f})"
    if promise.alone is not None:
        row("(the same alone)", training.composition, promise.alone, "dim")
        rise = 100 * (training.noise_multiplier / promise.alone - 1)
        spent += f"; the others raise the noise of the training by {rise:.2f} %"
    console.print(table)
    console.print(spent)


def _show_cost(console: Console, plan: RunPlan) -> None:
    for name, size in plan.parameters.items():
        console.print(f"{name}: {size:,} parameters")
    table = Table(
        title=f"work, from a short measurement on this machine's {plan.device}, one rank",
        title_justify="left",
    )
    for column in ("stage", "steps", "images per step", "estimated hours", "memory"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in plan.work:
        table.add_row(
            row.stage,
            f"{row.steps:,}",
            f"{row.images:,.0f}",
            f"{row.seconds / 3600:.3g}",
            f"{row.memory / 2**30:.2g} GiB",
        )
    console.print(table)
    hours = sum(row.seconds for row in plan.work) / 3600
    console.print(f"about {hours:.2g} hours in all; run.hours is {plan.config.run.hours:g}")
    console.print(
        "Hours and memory are of one rank that does all the work: divide by the number of ranks. Batches of "
        "public training that have no room go through the network in pieces. The decoded sensitive set takes "
        f"{plan.set_bytes / 2**30:.2g} GiB of disk, and of memory where that has room"
        + ("." if plan.config.privacy.unit == "image" else ", for each image that a group has.")
    )
