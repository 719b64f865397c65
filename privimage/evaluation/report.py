"""evaluate/report.json, the figures of a run for programs, and evaluate/report.html, the same for people.

The page is one file without links to anywhere. It is for the owner of the data: what was computed on
sensitive images without noise is marked as not covered by the promise.
"""

import base64
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from privimage import __version__
from privimage.config import Config
from privimage.config.methods import METHODS
from privimage.config.stages import STAGES
from privimage.evaluation import advice
from privimage.storage.files import read_json, write_json, write_whole
from privimage.storage.rundir import RunDir

if TYPE_CHECKING:
    from jinja2 import Template

PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "opacus",
    "dp-accounting",
    "torch-fidelity",
    "scikit-learn",
    "ffcv",
    "deepspeed",
)
MEASURED = ("seconds", "cpu_seconds", "gpu_seconds", "peak_memory_bytes", "images_per_second")
# Of a busy core and of a busy GPU with its share of the machine: for an estimate where none is measured.
WATTS = {"cpu_seconds": 10.0, "gpu_seconds": 500.0}
# What a report may show without a mark: beginnings of keys of report.json, and names of figures. Everything
# else counts as computed on sensitive images without noise, so that a new measure or figure is marked until
# someone has thought about it.
COVERED = (
    "method",
    "run",
    "privacy",
    "selection",
    "synthetic",
    "grid_classes",
    "parameters",
    "versions",
    "sensitive.images",  # N, which is taken as public; None where groups are the unit
    "sensitive.groups",  # N there
    "sensitive.test_images",
    "accuracy_note",
    "accuracy_before_images",
    "agreement",  # from the synthetic set alone
    *(f"resources.{name}" for name, stage in STAGES.items() if not stage.sensitive),
)
COVERED_FIGURES = ("samples", "selection", "loss", "budget")
CLASSES_SHOWN = 20  # of the table class by class
# Those of DPImageBench, what is said of the three together, and all that a report may have.
BENCHMARK = {"resnet": "ResNet", "wrn": "WideResNet", "resnext": "ResNeXt"}
OF_BENCHMARK = {"benchmark_best": "Best of the three", "benchmark_mean": "Mean of the three"}
CLASSIFIERS = {"lr": "Logistic regression", "mlp": "MLP", "cnn": "CNN"} | BENCHMARK
SCORES = CLASSIFIERS | OF_BENCHMARK  # keys of `accuracy`
FIDELITY = (
    "distance",
    "fid",
    "kid",
    "precision",
    "recall",
    "kernel_distance",
    "kernel_deviation",
    "inception_score",
)
# All numbers of report.json, for tables over many runs; null or missing where a run has not measured one.
NUMBERS = (
    *(
        f"{section}.{name}"
        for section in ("accuracy", "accuracy_before", "accuracy_ceiling")
        for name in SCORES
    ),
    *(
        f"{section}.{name}"
        for section in ("fidelity", "fidelity_before", "fidelity_vision")
        for name in FIDELITY
    ),
    *(f"semantics.{name}" for name in ("sds", "sds_all_public")),
    *(f"memorization.{name}" for name in ("nearest_is_training", "expected", "excess", "identical")),
    *(f"resources.{stage}.{name}" for stage in STAGES for name in MEASURED),
    *("agreement.percent", "privacy.epsilon", "privacy.delta", "selection.images", "parameters"),
)


def covered(key: str) -> bool:
    """Whether a number of report.json, by its dotted key, is public or covered by the guarantee."""
    return any(key == name or key.startswith(f"{name}.") for name in COVERED)


def uncovered(report: dict) -> list[str]:
    """The keys of a report whose values are not covered, down to the keys of mixed sections."""
    # A mixed section is listed key by key, a section of one kind as a whole.
    keys = []
    for key, value in report.items():
        if covered(key):
            continue
        mixed = isinstance(value, dict) and any(covered(f"{key}.{name}") for name in value)
        keys += [f"{key}.{name}" for name in value if not covered(f"{key}.{name}")] if mixed else [key]
    return keys


def versions() -> dict[str, str]:
    """Versions of PrivImage, Python and the packages that the numbers depend on; absent ones are left out."""
    installed = {"privimage": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def resources(run: RunDir, stages: tuple[str, ...]) -> dict[str, dict]:
    """Seconds, peak memory in bytes and images per second of each finished stage, from its record."""
    records = {stage: record for stage in stages if (record := run.record(stage)) is not None}
    return {stage: {name: record.get(name) for name in MEASURED} for stage, record in records.items()}


def write(run: RunDir, config: Config, results: dict) -> None:
    """Write report.json and report.html.

    `results` holds what the stage measured: privacy, accuracy, accuracy_before, fidelity, fidelity_before,
    semantics, memorization, selection, synthetic, sensitive, parameters, evaluate (the resources of the
    evaluation itself).
    """
    # The evaluation itself is not finished yet, so it has no record to read.
    measured = {**resources(run, config.stages), "evaluate": results.pop("evaluate")}
    report = {
        "method": config.method,
        "run": run.path.resolve().name,
        **results,
        "resources": measured,
        "versions": versions(),
    }
    report["not_covered_by_the_promise"] = uncovered(report)
    write_json(run.stage("evaluate") / "report.json", report)
    rebuild(run)


def read(path: Path) -> dict:
    """report.json, also of an older version: what that did not measure is None. Raises UserError."""
    later = ("accuracy_ceiling", "accuracy_ceiling_images", "accuracy_chance", "agreement", "classes")
    report = dict.fromkeys((*later, "fidelity_vision", "ledger")) | read_json(path)
    for section, keys in (("accuracy", SCORES), ("fidelity", FIDELITY)):
        for name in (section, f"{section}_before", f"{section}_ceiling", f"{section}_vision"):
            if report.get(name):
                report[name] = dict.fromkeys(keys) | report[name]
    return report


def rebuild(run: RunDir) -> None:
    """Rebuild report.html from report.json, the stages' records and the figures, without reading any data.

    Raises UserError that names a missing or damaged report.json.
    """
    path = run.path / "evaluate" / "report.json"
    report = read(path)
    measured = {**report["resources"], **resources(run, METHODS[report["method"]].stages)}
    measured = {stage: dict.fromkeys(MEASURED) | record for stage, record in measured.items()}
    page = template("report.html.j2").render(
        report=report,
        title=METHODS[report["method"]].title,
        resources=measured,
        stages={name: stage.title for name, stage in STAGES.items()},
        classifiers=SCORES,
        measured=[key for key in SCORES if report["accuracy"][key] is not None],
        benchmark=BENCHMARK,
        figures=embedded(path.parent / "figures"),
        covered_figures=COVERED_FIGURES,
        covered_key=covered,
        warnings=advice.warnings(report),
        by_class=_worst(report["classes"]),
        cost=cost(measured),
        watts=WATTS,
    )
    write_whole(path.with_name("report.html"), page.encode())


def _worst(classes: dict | None) -> dict | None:
    """The classes that have test images; the worst of them where there are many."""
    if classes is None:
        return None
    rows = [row for row in classes["of"] if row["accuracy"] is not None]
    if more := len(rows) > CLASSES_SHOWN:
        rows = sorted(rows, key=lambda row: row["accuracy"])[:CLASSES_SHOWN]
    return classes | {"of": rows, "more": more}


def cost(resources: dict[str, dict]) -> dict[str, float]:
    """Seconds, CPU and GPU seconds of all stages, and an estimate of kWh from these; unknown ones are 0."""
    total = {
        name: sum(record.get(name) or 0.0 for record in resources.values()) for name in ("seconds", *WATTS)
    }
    return total | {"kwh": sum(total[name] * watts for name, watts in WATTS.items()) / 3.6e6}


def template(name: str) -> "Template":
    """A page of this package with its filters."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # StrictUndefined: a misspelt name is an error, not an empty place on the page. Everything is escaped,
    # since class names come from files.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        duration=_duration,
        size=_size,
        plain=_plain,
        count=lambda value: f"{value:,}",
        short=lambda name: name.split(",")[0],
    )
    return environment.get_template(name)


def embedded(folder: Path) -> dict[str, str]:
    """All pictures of a folder as data URIs, by name."""
    return {
        file.stem: "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
        for file in sorted(folder.glob("*.png"))
    }


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.1f} min" if minutes < 100 else f"{hours:.1f} h"


def _size(count: float | None) -> str:
    return (
        "-" if count is None else f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"
    )


def _plain(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, without an exponent where possible."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e6:
        # Very small or large numbers: 1.2e-5 in place of 1.20e-05.
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
