"""`privimage plan`: what a configuration promises and what it will cost, without touching data."""

import torch
from rich.console import Console
from rich.table import Table

from privimage.config import Config
from privimage.distributed.precision import settled
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.families import family
from privimage.privacy.account import plan_without_noise
from privimage.privacy.accounting import SampledGaussian, training_noise
from privimage.privacy.mechanisms import SemanticHistogram
from privimage.privacy.plan import PrivacyPlan, make_plan

# (images, classes) of the training splits that are read by kind: public facts.
KNOWN = {
    "cifar10": (50_000, 10),
    "mnist": (60_000, 10),
    "fashion-mnist": (60_000, 10),
    "celeba": (202_599, 1),
    "digits": (1437, 10),
}


def public_size(config: Config) -> tuple[int, int]:
    """N and the number of classes (0 if unlabelled), as far as the configuration tells.

    Raises UserError if it does not.
    """
    sensitive = config.data.sensitive
    known = KNOWN.get(sensitive.kind, (None, None))
    count, classes = sensitive.count or known[0], sensitive.classes or known[1]
    if count is None:
        raise UserError(
            "data.sensitive.count: `plan` does not touch data; give the number of sensitive images"
        )
    if not sensitive.labelled:
        return count, 0
    if classes is None:
        raise UserError(
            "data.sensitive.classes: `plan` does not touch data; give the number of sensitive classes, or "
            "labelled: false"
        )
    return count, classes


def show(config: Config) -> None:
    """Print the budget split, noise multipliers by both accountants, steps, parameters, and estimated time
    and memory.
    """
    count, classes = public_size(config)
    console = Console(highlight=False)
    if config.spec.private:
        plan = make_plan(config, count)
        other = make_plan(config, count, "rdp" if plan.accountant == "pld" else "pld")
        _show_privacy(console, count, plan, other)
        if config.spec.pretraining == "selected":
            _warn_of_noise(console, plan.the(SemanticHistogram), count, classes)
        if plan.delta >= 1 / count:
            console.print(
                f"[yellow]warning:[/] delta {plan.delta:g} is not below 1/N = {1 / count:.2g}: revealing "
                "one whole image would be within the promise"
            )
    else:
        plan = plan_without_noise(config, count)
        console.print(f"{config.spec.title} adds no noise: its output is [bold]not private[/].")
    if config.spec.generator != "none":
        _show_cost(console, config, plan, classes)


def _warn_of_noise(console: Console, query: SemanticHistogram, count: int, classes: int) -> None:
    votes = count * query.per_image / max(classes, 1)
    # About the largest of many bins' noise against half of the votes of a class.
    if 8 * query.standard_deviation > votes:
        console.print(
            f"[yellow]warning:[/] noise of {query.standard_deviation:.3g} votes per bin is large beside the "
            f"{votes:.0f} votes of a sensitive class: the query may choose wrong public classes; a larger "
            "select.max_rise makes it surer"
        )


def _show_privacy(console: Console, count: int, plan: PrivacyPlan, other: PrivacyPlan) -> None:
    pld, rdp = (plan, other) if plan.accountant == "pld" else (other, plan)
    promise = f"epsilon {plan.epsilon:g}, delta {plan.delta:.3g}, add or remove one of {count:,} images"
    table = Table(title=f"{promise}; used: {plan.accountant.upper()}", title_justify="left")
    for column in ("mechanism", "uses", "sample rate", "noise multiplier PLD", "RDP"):
        table.add_column(column, justify="left" if column == "mechanism" else "right")

    def row(
        name: str, mechanism: SampledGaussian, by_pld: float, by_rdp: float, style: str | None = None
    ) -> None:
        table.add_row(
            name,
            f"{mechanism.count}",
            f"{mechanism.sample_rate:.6g}",
            f"{by_pld:.4g}",
            f"{by_rdp:.4g}",
            style=style,
        )

    for used, by_pld, by_rdp in zip(plan.mechanisms, pld.mechanisms, rdp.mechanisms, strict=True):
        row(used.name, used.composition, by_pld.noise_multiplier, by_rdp.noise_multiplier)
    if len(plan.mechanisms) > 1:
        row("(the same without a query)", plan.training.composition, _alone(pld), _alone(rdp), "dim")
    console.print(table)
    rise = (
        "; the query raises the noise of the training by "
        f"{100 * (plan.training.noise_multiplier / _alone(plan) - 1):.2f} %"
        if len(plan.mechanisms) > 1
        else ""
    )
    console.print(f"spent by {plan.accountant.upper()}: epsilon {plan.spent():.4f}{rise}")


def _alone(plan: PrivacyPlan) -> float:
    return training_noise(plan.epsilon, plan.delta, plan.training.composition, (), plan.accountant)


def _show_cost(console: Console, config: Config, plan: PrivacyPlan, classes: int) -> None:
    device = torch.device("cuda" if config.runtime.device != "cpu" and torch.cuda.is_available() else "cpu")
    if config.runtime.threads:
        torch.set_num_threads(config.runtime.threads)
    config = settled(config, World(0, 0, 1, 1, device))
    work = Table(
        title=f"work, from a short measurement on this machine's {device.type}, one rank",
        title_justify="left",
    )
    for column in ("stage", "steps", "images a step", "estimated hours", "memory"):
        work.add_column(column, justify="left" if column == "stage" else "right")
    for row in family(config).work(config, plan, classes, device):
        work.add_row(
            row.stage,
            f"{row.steps:,}",
            f"{row.images:,.0f}",
            f"{row.seconds / 3600:.3g}",
            f"{row.memory / 2**30:.2g} GiB",
        )
    for name, size in family(config).sizes(config, classes).items():
        console.print(f"{name}: {size:,} parameters")
    console.print(work)
    console.print(
        "Hours and memory are of one rank that does all the work: divide by the number of ranks; the "
        "network of the query is not included."
    )
