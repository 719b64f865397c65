"""How many labels the private classifier gets right, by the noise and by its steps.

    python benchmarks/private_classifier.py [CONFIG] [section.key=value ...]

Stages `query` (once) and `classify`, with a fixed key, so nothing is promised or charged: for public sets.
Each row is one training, on fixed features or on those of the query network too; the test images are those of
CONFIG (default: the UCI digits of configs/quickstart.yaml). `--budgets` leaves out the rows that vary steps
and rates. "clearness" is N over the standard deviation of the noise of all steps together, by which
`privimage.recipes.labels` and the learning rate go.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from privimage.config import Config, load
from privimage.data.sources import open_sensitive
from privimage.distributed.world import ALONE
from privimage.families.base import image_shape
from privimage.models.label_features import LabelClassifier
from privimage.privacy.mechanisms import NoisyGradients
from privimage.privacy.plan import plan_from_dict
from privimage.runs import pipeline
from privimage.stages.classifier import learning_rate, trained_classifier
from privimage.storage.files import read_json
from privimage.storage.rundir import RunDir

BUDGETS = ((10.0, 0.2), (10.0, 0.005), (1.0, 0.2), (1.0, 0.05))  # epsilon, rise of the training's noise
STEPS = (4, 15, 30, 60)
RATES = (0.25, 1.0, 4.0)  # times the one that the stage takes


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--budgets", action="store_true")
    args = parser.parse_args()
    print("| features | epsilon | rise | steps | times the rate | clearness | right |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for epsilon, rise in BUDGETS:
            for features in ("fixed", "query"):
                row(args, Path(folder), epsilon, rise, 30, features=features)
        if args.budgets:
            return
        for steps in STEPS:
            row(args, Path(folder), 1.0, 0.2, steps)
        for times in RATES:
            row(args, Path(folder), 1.0, 0.2, 30, times)


def row(
    args: argparse.Namespace,
    folder: Path,
    epsilon: float,
    rise: float,
    steps: int,
    times: float = 1.0,
    features: str = "query",
) -> None:
    """Train once and print one line."""
    run = folder / f"{epsilon}-{rise}-{steps}-{times}-{features}"
    words = [f"privacy.epsilon={epsilon}", f"classify.max_rise={rise}", f"classify.steps={steps}"]
    words += ["classify.use=true", f"classify.features={features}", "privacy.insecure_fixed_key=1"]
    words += [f"run.dir={run}", f"run.shared={folder / 'shared'}"]
    if times != 1:
        planned = plan_of(folder / f"{epsilon}-{rise}-{steps}-1.0-{features}")
        words.append(f"classify.learning_rate={times * learning_rate(planned, planned.count)}")
    config = load(args.config, [*args.overrides, *words])
    assert pipeline.run(config, ["prepare", "query", "classify"]) == 0
    plan = plan_of(run)
    clear = plan.count / plan.standard_deviation
    cells = [features, f"{epsilon:g}", f"{rise:g}", steps, f"{times:g}", f"{clear:,.0f}"]
    print("|", " | ".join(map(str, [*cells, f"{right(config):.1f} %"])), "|", flush=True)


def plan_of(run: Path) -> NoisyGradients:
    """What was planned for the classifier of a run."""
    return plan_from_dict(read_json(run / "private" / "account.json")["plan"]).the(NoisyGradients)


def right(config: Config) -> float:
    """Percent of the test images whose label the classifier of a run sees."""
    test = open_sensitive(config, "test", ALONE, RunDir(config.run.dir).sensitive)
    trained = trained_classifier(config, RunDir(config.run.dir), ALONE)
    seen = LabelClassifier(trained.state, image_shape(config), ALONE.device)
    images = np.moveaxis(test.images[: test.count], 1, -1)
    return 100 * float((seen.labels(images) == test.labels).mean())


if __name__ == "__main__":
    main()
