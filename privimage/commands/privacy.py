"""`privimage privacy`: what was spent on a sensitive set, by one run or by all."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from privimage.errors import UserError
from privimage.privacy.accounting import epsilon
from privimage.privacy.ledger import Ledger, read
from privimage.privacy.limits import describe
from privimage.privacy.relation import ONE_IMAGE
from privimage.privacy.spent import Spent
from privimage.storage.files import read_json

DELTA = 1e-5  # for a ledger on its own, which has no delta


def show(path: Path) -> None:
    """Print the composition, by both accountants, of a run directory or of a whole ledger file.

    Raises UserError for a path that is neither.
    """
    console = Console(highlight=False)
    if (path / "private" / "account.json").exists():
        account = read_json(path / "private" / "account.json")
        ledger = (
            account["ledger"]["path"] if account.get("version") else account["ledger"]
        )  # before version 2 the path alone
        delta, spent = account["plan"]["delta"], read(Path(ledger))
        _compose(console, f"run {path}", spent, account["run"], delta)
        _compose(console, "all runs on its sensitive set", spent, None, delta)
        console.print(f"ledger: {ledger}")
    elif path.is_file():
        _compose(console, f"ledger {path}", read(path), None, DELTA)
    elif path.is_dir():
        raise UserError(
            f"{path}: no run that has begun to use sensitive data (private/account.json is missing)"
        )
    else:
        raise UserError(f"{path}: no such run directory or ledger")


def set_budget(path: Path, epsilon: float, delta: float) -> None:
    """Write a budget for everything that is ever computed on a sensitive set into its ledger file, in place
    of the one there.

    Raises UserError for a path that is no ledger.
    """
    if not path.is_file() or path.suffix != ".jsonl" or read(path).identity is None:
        raise UserError(f"{path}: no ledger; a budget is set on the file that `privimage privacy RUN` names")
    Ledger(path.parent, path.stem).set_budget((epsilon, delta))


def _compose(console: Console, title: str, spent: Spent, run: str | None, delta: float) -> None:
    mechanisms = spent.mechanisms(run)
    table = Table(title=title, title_justify="left")
    for column in ("mechanism", "noise multiplier", "sample rate", "uses"):
        table.add_column(column, justify="left" if column == "mechanism" else "right")
    # One line per kind of use, then the composition by the accountants that know the relation.
    for m in mechanisms:
        table.add_row(m.kind, f"{m.noise_multiplier:.5g}", f"{m.sample_rate:.6g}", str(m.count))
    console.print(table)
    relation = next(iter(spent.relations), ONE_IMAGE)
    accountants = ("pld",) if relation.replacement else ("pld", "rdp")
    by = ", ".join(
        f"{epsilon(mechanisms, delta, accountant):.4f} ({accountant.upper()})" for accountant in accountants
    )
    console.print(f"epsilon {by if mechanisms else '0'} at delta {delta:.3g}; neighbours: {relation}")
    if spent.torn:
        console.print(f"{spent.torn} torn lines, from crashes in the middle of a write, are counted as spent")
    without_noise = spent.not_private if run is None else spent.not_private & {run}
    if run is None and spent.budget is not None:
        console.print(f"budget of all runs: {describe(spent.budget)}")
    if without_noise:
        console.print(
            f"[bold]not private:[/] {len(without_noise)} run(s) used the set without noise or with a fixed "
            "key; their output is covered by nothing"
        )
