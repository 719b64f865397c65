"""The command `privimage`, with one sub-command per stage. It parses and calls; nothing else happens here."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from privimage.config.stages import STAGES
from privimage.errors import UserError, earlier_status, tell
from privimage.storage.owner_only import close_process

app = typer.Typer(
    name="privimage",
    help=(
        "Differentially private image synthesis: a private image set in, a synthetic one with a proof of "
        "its privacy out."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of settings")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="settings that replace those of the file"),
]


def _run(config: Path, overrides: list[str] | None, stages: tuple[str, ...]) -> NoReturn:
    from privimage.config import load

    settings = load(config, overrides or ())  # report a mistake before the slow imports
    from privimage.runs import pipeline

    sys.exit(pipeline.run(settings, stages))


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run all stages of the method; those that are finished are skipped."""
    _run(config, overrides, ())


def _add(stage: str, description: str) -> None:
    @app.command(name=stage, help=description)
    def command(config: ConfigFile, overrides: Overrides = None) -> None:
        _run(config, overrides, (stage,))


for _name, _stage in STAGES.items():
    _add(_name, _stage.help)


@app.command()
def init(
    sensitive: Annotated[
        str,
        typer.Option(metavar="PATH", help="the images that must stay private; or digits, an embedded set"),
    ],
    public: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="images that anyone may see; left out: embedded characters"),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(metavar="PATH", help="held-out sensitive images to measure accuracy on")
    ] = None,
    hours: Annotated[float, typer.Option(min=0.01, max=10_000, help="what the run may take")] = 2.0,
    epsilon: Annotated[float, typer.Option(min=1e-6, help="of the whole run")] = 10.0,
    delta: Annotated[float | None, typer.Option(min=0, max=1, help="left out: 1 / (N ln N)")] = None,
    group: Annotated[
        str | None,
        typer.Option(
            help="promise for persons: the column, level of folders or pattern that names whom an image "
            "belongs to"
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="state N, images or groups, in place of counting")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="state the number of classes, or their names: no,yes")
    ] = None,
    resolution: Annotated[int | None, typer.Option(min=8, max=256, help="pixels of a side")] = None,
    channels: Annotated[int | None, typer.Option(min=1, max=3, help="1 grey, 3 colour")] = None,
    method: Annotated[str, typer.Option(help="one of `privimage methods`")] = "privimage+d",
    run_dir: Annotated[Path, typer.Option(help="where the run will live")] = Path("runs/mine"),
) -> None:
    """Write a complete, commented configuration that this machine finishes in the time given."""
    from privimage.commands.init import Wanted, write

    told = (sensitive, public, test, hours, epsilon, delta, group, count, classes, resolution, channels)
    write(Wanted(*told, method, run_dir))


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Show budget, noise, steps, parameters, and the time and memory to ask for, without touching data."""
    from privimage.commands.plan import show
    from privimage.config import load

    show(load(config, overrides or ()))


@app.command()
def doctor(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check everything that a run needs, for all its stages; status 2 if something is amiss."""
    from privimage.commands.doctor import run
    from privimage.config import load

    sys.exit(run(load(config, overrides or ())))


@app.command()
def rehearse(
    config: ConfigFile,
    overrides: Overrides = None,
    tries: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="KEY=VALUE,...", help="a setting and values to try; may be repeated"),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each combination")] = 1,
) -> None:
    """Try settings on a part of the public set in the place of the sensitive one; costs no privacy."""
    from privimage.commands.rehearse import run
    from privimage.config import load

    sys.exit(run(load(config, overrides or ()), tries or (), seeds))


@app.command()
def starter(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="the folder of the starter")] = Path("starter/mine"),
    licence: Annotated[str, typer.Option(help="of the weights, as an SPDX identifier")] = "unknown",
    data: Annotated[str, typer.Option(help="what the public images are, for the card")] = "",
) -> None:
    """Train a query network and a diffusion model on all of the public set, for other runs to begin with."""
    from privimage.commands.starter import run
    from privimage.config import load

    sys.exit(run(load(config, overrides or ()), out, licence, data))


@app.command()
def submit(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [SECTION.KEY=VALUE]...",
            help="YAML file of settings, or of an experiment, and settings that replace those of the file",
        ),
    ],
    sweep: Annotated[
        bool, typer.Option("--sweep", help="several files, or several values separated by commas")
    ] = False,
    unchecked: Annotated[bool, typer.Option("--unchecked", help="also if `doctor` finds mistakes")] = False,
) -> None:
    """Queue a run, a sweep or an experiment as jobs of a SLURM cluster."""
    from privimage.cluster.jobs import submit as submit_jobs

    submit_jobs(words, sweep, not unchecked)


@app.command()
def audit(
    config: ConfigFile,
    overrides: Overrides = None,
    canaries: Annotated[
        int,
        typer.Option(
            min=100, max=1_000_000, help="how many; more give a tighter bound, and take time by their square"
        ),
    ] = 5000,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.999999, help="probability with which the bound holds")
    ] = 0.95,
    images: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="of a canary; several break a promise for single images, as they should"
        ),
    ] = None,
) -> None:
    """Attack all that a run draws from the sensitive set with canaries.

    A lower bound on epsilon beside the claim, without touching data.
    """
    from privimage.commands.audit import run
    from privimage.config import load
    from privimage.recipes import settled
    from privimage.recipes.facts import public_size

    settings = settled(load(config, overrides or ()))
    sys.exit(run(settings, public_size(settings)[0], canaries, confidence, images))


@app.command()
def privacy(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|LEDGER", help="run directory, or ledger of a sensitive set")
    ],
    budget: Annotated[
        float | None, typer.Option(min=0, help="replace the budget that the ledger holds by this epsilon")
    ] = None,
    delta: Annotated[float, typer.Option(min=0, max=1, help="delta of the new budget")] = 1e-5,
) -> None:
    """Compose what was spent on a sensitive set, from its ledger; or set the budget of all runs on it."""
    from privimage.commands.privacy import set_budget, show

    if budget is not None:
        set_budget(path, budget, delta)
    show(path)


@app.command()
def sample(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="run directory, or its folder release/")],
    count: Annotated[int, typer.Option(min=1, help="how many images, labels in turn")],
    seed: Annotated[int, typer.Option(min=0, help="another seed gives other images")] = 1,
    formats: Annotated[str, typer.Option(help="those of synthesize.formats, as parquet,png")] = "",
    out: Annotated[Path | None, typer.Option(help="unset: sample-SEED beside release/")] = None,
) -> None:
    """Draw more images from a released model. It is post-processing and costs no privacy."""
    from privimage.commands.sample import run

    run(path, count, seed, formats, out)


@app.command()
def report(path: Annotated[Path, typer.Argument(metavar="RUN", help="run directory")]) -> None:
    """Rebuild evaluate/report.html from what the run left."""
    from privimage.evaluation.report import rebuild
    from privimage.storage.rundir import RunDir

    rebuild(RunDir(path))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="directories of evaluated runs")],
    out: Annotated[Path, typer.Option(help="the page; only you can read it")] = Path("comparison.html"),
) -> None:
    """Set runs side by side on one page for the owner of the data."""
    from privimage.evaluation.compare import compare as write

    write(runs, out)
    sys.stdout.write(f"{out}: for the owner of the data, it holds numbers on sensitive images\n")


ExperimentFile = Annotated[
    Path, typer.Argument(metavar="FILE", help="YAML file of an experiment, see configs/experiments")
]


@app.command()
def experiment(file: ExperimentFile, overrides: Overrides = None) -> None:
    """Run all runs of an experiment, one after the other; those that are finished are skipped."""
    from privimage.experiments.execute import execute

    sys.exit(execute(file, overrides or ()))


@app.command()
def table(file: ExperimentFile, overrides: Overrides = None) -> None:
    """Gather the runs of an experiment into Markdown, CSV and a figure, beside them."""
    from privimage.experiments.table import write

    sys.stdout.write(write(file, overrides or ()))


@app.command()
def methods() -> None:
    """List the methods that can be run, as settings of one pipeline."""
    from privimage.commands.methods import show

    show()


def main() -> None:
    """Entry point.

    The exit status is 0 done, 2 a mistake, reported in one line, 75 stopped with the state saved, 1 anything
    else.
    """
    # Under torchrun a rank may be started again after one has failed for good.
    if (status := earlier_status()) is not None:
        sys.exit(status)
    # Before any file is written: a run's files are for their owner alone.
    close_process()
    try:
        app()
    except UserError as error:
        tell(str(error), error.status)
        sys.exit(error.status)
