"""Ways to draw images from a released model, judged by classifiers on *training* images of the sensitive set.

    python benchmarks/drawing.py RUN [--judge 3000] [--seed 11] [KEY=VALUE,KEY=VALUE ...]

RUN is a run of a diffusion method that ended. Each argument is one row: settings of `synthesize` (`samples`,
`sampler_steps`, `guidance`, `classifier_guidance`) and `epochs` of the CNN, all others as the run had them.
Drawing costs no privacy, but what is printed is computed from sensitive images without noise: for sets on
which settings may be chosen. The held-out images are not looked at, so that a table of results that are
measured on them stays one.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from privimage import open_release
from privimage.config import Config, load
from privimage.config.results import Synthesize
from privimage.config.section import validated
from privimage.data.sources import open_sensitive
from privimage.distributed.world import ALONE
from privimage.evaluation import utility
from privimage.evaluation.utility import Labelled, Training
from privimage.storage.rundir import RunDir


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("rows", nargs="*", default=[""])
    parser.add_argument("--judge", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=11)
    given = parser.parse_intermixed_args()
    config = load(given.run / "config.yaml")
    train = open_sensitive(config, "train", ALONE, RunDir(given.run).sensitive)
    chosen = np.sort(np.random.default_rng(0).permutation(len(train.labels))[: given.judge])
    tests = Labelled(train.images[chosen], train.labels[chosen])
    print("| drawn with | seconds | LR | MLP | CNN |\n|---|---|---|---|---|", flush=True)
    for row in given.rows:
        started = time.monotonic()
        changes = dict(pair.split("=") for pair in row.split(",") if pair)
        epochs = int(changes.pop("epochs", config.evaluate.cnn_epochs))
        drawn = draw(given.run, changes, given.seed)
        seconds = time.monotonic() - started
        cells = [row or "as it was", f"{seconds:.0f}", *judged(config, drawn, tests, epochs)]
        print("|", " | ".join(cells), "|", flush=True)


def draw(run: Path, changes: dict[str, str], seed: int) -> Labelled:
    """Images of the released model with other settings of `synthesize`."""
    release = open_release(run)
    settings = validated(Synthesize, release._model["synthesize"] | changes, "drawing")
    release._model["synthesize"] = settings.model_dump(mode="json")
    images, labels = release.sample(settings.samples, seed)
    return Labelled(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64))


def judged(config: Config, drawn: Labelled, tests: Labelled, epochs: int) -> list[str]:
    """LR, MLP and CNN that learn from the images, in percent."""
    scores = [utility.percent(fit(drawn, tests, 0), tests.labels) for fit in utility.SHALLOW.values()]
    how = Training(epochs, config.evaluate.cnn_batch_size, config.data.flip, 0, ALONE)
    network = utility.train_cnn(drawn, int(tests.labels.max()) + 1, how)
    seen = utility.predict(network, tests.images, ALONE.device).labels
    return [f"{score:.1f}" for score in (*scores, utility.percent(seen, tests.labels))]


if __name__ == "__main__":
    main()
