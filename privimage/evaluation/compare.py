"""Runs side by side, as one page for the owner of the data: promise, accuracies, fidelity, grids, cost."""

from collections.abc import Sequence
from pathlib import Path

from privimage.config.methods import METHODS
from privimage.errors import UserError
from privimage.evaluation import advice, report
from privimage.storage.files import write_whole


def compare(runs: Sequence[Path], out: Path) -> None:
    """Write the page `out`, of mode 0600, from the report.json and the grids of runs that were evaluated.

    It is one file without links to anywhere. It holds numbers on sensitive images, and says so. Raises
    UserError for a run without a report.
    """
    columns = [_column(run) for run in runs]
    # Numbers on other images cannot be compared.
    sizes = ("images", "groups", "test_images")
    sets = {tuple(c["report"]["sensitive"].get(name) for name in sizes) for c in columns}
    distances = {c["report"]["fidelity"]["name"] for c in columns if c["report"]["fidelity"]["name"]}
    page = report.template("compare.html.j2").render(
        runs=columns,
        classifiers=report.SCORES,
        best={key: _best(columns, key) for key in report.SCORES},
        same_set=len(sets) == 1,
        distances=sorted(distances),
    )
    if not out.parent.is_dir():
        raise UserError(f"{out.parent}: no such folder")
    write_whole(out, page.encode())


def _column(run: Path) -> dict:
    path = run / "evaluate" / "report.json"
    if not path.exists():
        raise UserError(f"{run}: no report (evaluate/report.json is missing); `privimage evaluate` makes one")
    told = report.read(path)
    figures = report.embedded(path.parent / "figures")
    return {
        "report": told,
        "title": METHODS[told["method"]].title,
        "grid": figures.get("samples"),
        "cost": report.cost(told["resources"]),
        "warnings": advice.warnings(told),
    }


def _best(columns: list[dict], key: str) -> float | None:
    """The highest accuracy of one classifier over all runs."""
    known = [column["report"]["accuracy"].get(key) for column in columns]
    return max((score for score in known if score is not None), default=None)
