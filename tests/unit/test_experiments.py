"""Experiments.

Their files, their combinations, and tables that tell what the runs told and why some are missing.
"""

import csv
import signal
import statistics
import sys
from pathlib import Path

import pytest
from ranks import REPOSITORY, TINY

from privimage.cluster import jobs
from privimage.distributed.preemption import SIGNALS
from privimage.errors import UserError
from privimage.evaluation import report
from privimage.experiments import execute, table
from privimage.experiments.gather import gather, state_of
from privimage.experiments.settings import Measure, PlannedRun, is_experiment, load
from privimage.storage.files import write_json
from privimage.storage.rundir import RunDir

SHIPPED = sorted((REPOSITORY / "configs" / "experiments").glob("*.yaml"))
TEXT = """
title: Two methods
base: {base}
runs: {runs}
settings: [synthesize.samples=30]
axes:
  method:
    privimage+d: [method=privimage+d]
    dpdm: [method=dpdm, finetune.steps=5]
  epsilon:
    10: [privacy.epsilon=10]
    1: {{settings: [privacy.epsilon=1]}}
rules:
  - {{when: {{method: dpdm, epsilon: [1]}}, settings: [finetune.steps=7]}}
seeds: [0, 3]
measures:
  LR: {{key: accuracy.lr, best: highest, unit: "%"}}
  FD: {{key: fidelity.distance, best: lowest, digits: 2}}
  time: {{key: resources.query.seconds, unit: min, divide_by: 60}}
source: a paper
published:
  - {{when: {{epsilon: 10}}, values: {{LR: 32.5}}}}
  - {{when: {{epsilon: 10, method: dpdm}}, values: {{LR: 20.75}}}}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a small experiment whose runs are below `tmp_path/runs`."""
    path = tmp_path / "small.yaml"
    path.write_text(TEXT.format(base=TINY, runs=tmp_path / "runs"))
    return path


def edited(path: Path, old: str, new: str) -> Path:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return path


def finish(run: PlannedRun, accuracy: float | None, distance: float = 1.0, **resources: dict) -> None:
    """Leave what a finished run leaves."""
    folder = RunDir(run.config.run.dir)
    folder.path.mkdir(parents=True)
    folder.reconcile(run.config)
    for stage in run.config.stages:
        folder.finish(stage, {"images": 1})
    write_json(
        folder.path / "evaluate" / "report.json",
        {"accuracy": {"lr": accuracy}, "fidelity": {"distance": distance}, "resources": resources},
    )


def test_all_combinations_are_runs_with_places_of_their_own(path: Path, tmp_path: Path) -> None:
    runs = load(path).all_runs()
    # every combination before any second seed, so that a table of what is there so far has all rows
    assert [run.name for run in runs] == [
        f"{m}-epsilon{e}-seed{s}" for s in (0, 3) for m in ("privimage+d", "dpdm") for e in (10, 1)
    ]
    for run in runs:
        config = run.config
        assert config.run.dir == tmp_path / "runs" / run.name
        assert config.run.shared == tmp_path / "runs" / "shared"
        assert (config.method, config.privacy.epsilon, config.runtime.seed) == (
            run.choice["method"],
            float(run.choice["epsilon"]),
            run.seed,
        )
        assert config.synthesize.samples == 30
        expected = {("privimage+d", "10"): 8, ("privimage+d", "1"): 8, ("dpdm", "10"): 5, ("dpdm", "1"): 7}
        assert config.finetune.steps == expected[run.choice["method"], run.choice["epsilon"]]


def test_an_option_may_have_a_configuration_of_its_own_and_combinations_may_be_left_out(
    path: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.yaml").write_text(TINY.read_text().replace("resolution: 8", "resolution: 16"))
    edited(path, "dpdm: [method=dpdm, finetune.steps=5]", "dpdm: {base: other.yaml, settings: [method=dpdm]}")
    edited(path, "seeds:", "skip: [{when: {method: dpdm, epsilon: 10}}]\nseeds:")
    runs = load(path).all_runs(["runtime.threads=3"])
    assert [(run.config.method, run.config.data.resolution) for run in runs] == [
        *[("privimage+d", 8)] * 2,
        ("dpdm", 16),
    ] * 2
    assert {run.config.runtime.threads for run in runs} == {3}
    assert {run.choice["epsilon"] for run in runs if run.choice["method"] == "dpdm"} == {"1"}


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seeds:", "seed:", "seed: unknown setting (did you mean 'seeds'?)"),
        (
            "{settings: [privacy.epsilon=1]}",
            "{setings: [privacy.epsilon=1]}",
            "axes.epsilon.1.setings: unknown setting (did you mean 'settings'?)",
        ),
        ("epsilon: [1]", "epsilom: [1]", "rules.0.when: unknown axis 'epsilom' (did you mean 'epsilon'?)"),
        (
            "when: {method: dpdm",
            "when: {method: dpgm",
            "rules.0.when.method: unknown option 'dpgm' (did you mean 'dpdm'?)",
        ),
        (
            "values: {LR: 20.75}",
            "values: {LRR: 20.75}",
            "published.1.values: unknown measure 'LRR' (did you mean 'LR'?)",
        ),
        (
            "key: accuracy.lr",
            "key: acuracy.lr",
            "measures.LR.key: no report has this number (did you mean 'accuracy.lr'?)",
        ),
        (
            "finetune.steps=5",
            "finetune.stesp=5",
            "dpdm-epsilon10-seed0: .*finetune.stesp: unknown setting (did you mean 'steps'?)",
        ),
        (
            "method=dpdm",
            "method=dpdn",
            "dpdm-epsilon10-seed0: .*method: unknown 'dpdn' (did you mean 'dpdm'?)",
        ),
        ("base:", "# base:", "base: required setting is missing"),
        (str(TINY), "nowhere.yaml", "nowhere.yaml: no such configuration file"),
        (
            "  epsilon:\n    10: [privacy.epsilon=10]\n    1: {settings: [privacy.epsilon=1]}",
            "  epsilon: {}",
            "axes.epsilon: has no option",
        ),
        (
            "    10: [",
            '    "10 ": [privacy.epsilon=10]\n    10: [',
            "two combinations would have the run directory",
        ),
        ("title: Two methods", "", "title: required setting is missing"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_file_and_the_key(
    path: Path, old: str, new: str, told: str
) -> None:
    edited(path, old, new)
    with pytest.raises(UserError) as error:
        load(path).all_runs()
    line = str(error.value)
    assert line.startswith(str(path)) and "\n" not in line
    assert all(part in line for part in told.split(".*")), line


def test_every_shipped_experiment_is_valid_and_those_with_runs_in_common_plan_them_alike() -> None:
    planned: dict[Path, tuple[Path, dict]] = {}
    shared = 0
    for path in SHIPPED:
        assert is_experiment(path)
        for run in load(path).all_runs():
            tree = run.config.model_dump()
            other, same = planned.setdefault(run.config.run.dir, (path, tree))
            assert same == tree, f"{run.name} of {path.name} and {other.name}"
            shared += other != path
    assert shared > 20  # figure 6 and the selection look at runs of table 2


def test_a_configuration_is_not_an_experiment(path: Path) -> None:
    assert is_experiment(path)
    assert not is_experiment(TINY)


def test_the_table_tells_what_the_reports_tell(path: Path, tmp_path: Path) -> None:
    given, file = {}, load(path)
    for number, run in enumerate(run for choice in file.experiment.choices for run in file.runs_of(choice)):
        given[run.name] = 50 + number**2 / 7
        finish(run, given[run.name], distance=100 - number, query={"seconds": 90.0}) if run.choice[
            "method"
        ] != "dpdm" else finish(run, given[run.name])
    text = table.write(path)
    assert text == (tmp_path / "runs" / f"{path.stem}.md").read_text()
    assert "8 of 8 runs, mean ± standard deviation over 2 seeds. In brackets: a paper." in text
    with open(tmp_path / "runs" / f"{path.stem}.csv") as file:
        lines = {(line["method"], line["epsilon"], line["measure"]): line for line in csv.DictReader(file)}
    assert len(lines) == 2 * 2 * 3
    for (method, epsilon, measure), line in lines.items():
        expected = [given[f"{method}-epsilon{epsilon}-seed{seed}"] for seed in (0, 3)]
        if measure == "LR":
            assert [float(value) for value in line["values"].split()] == expected
            assert float(line["mean"]) == statistics.fmean(expected)
            assert float(line["std"]) == statistics.stdev(expected)
            assert line["published"] == {("privimage+d", "10"): "32.5", ("dpdm", "10"): "20.75"}.get(
                (method, epsilon), ""
            )
            assert f"{statistics.fmean(expected):.1f} ± {statistics.stdev(expected):.1f}" in text
        if measure == "time":
            assert line["mean"] == ("" if method == "dpdm" else "1.5")
    rows = [line for line in text.splitlines() if line.startswith(("| dpdm", "| privimage"))]
    assert rows == [
        "| privimage+d | 50.1 ± 0.1 [32.5] | 99.50 ± 0.71 | 1.5 ± 0.0 |",
        "| dpdm | **52.9 ± 0.9** [20.75] | **1.00 ± 0.00** | - |",
        "| privimage+d | 50.9 ± 0.5 | 97.50 ± 0.71 | 1.5 ± 0.0 |",
        "| dpdm | **56.1 ± 1.3** | **1.00 ± 0.00** | - |",
    ]
    assert (tmp_path / "runs" / f"{path.stem}.png").stat().st_size > 5000


def test_a_gap_is_shown_with_its_reason(path: Path, tmp_path: Path) -> None:
    runs = {run.name: run for run in load(path).all_runs()}
    finish(runs["privimage+d-epsilon10-seed0"], 70.0)
    finish(runs["privimage+d-epsilon10-seed3"], 80.0)
    finish(runs["dpdm-epsilon10-seed0"], 40.0)
    failed, stopped, running = (
        RunDir(runs[name].config.run.dir)
        for name in ("dpdm-epsilon10-seed3", "dpdm-epsilon1-seed0", "privimage+d-epsilon1-seed0")
    )
    for run, name in (
        (failed, "dpdm-epsilon10-seed3"),
        (stopped, "dpdm-epsilon1-seed0"),
        (running, "privimage+d-epsilon1-seed0"),
    ):
        run.path.mkdir(parents=True)
        run.reconcile(runs[name].config)
        run.finish("finetune", {"images": 1})
    failed.note_failure("data.sensitive.path: not there")
    with running.lock():
        text = table.write(path)
    assert "3 of 8 runs" in text
    assert "| dpdm | 40.0 (1 of 2) [20.75] |" in text
    assert "| dpdm | stopped | stopped | stopped |" in text
    assert "| privimage+d | running | running | running |" in text
    assert text.splitlines()[-5:] == [
        "- privimage+d-epsilon1-seed0: running: at prepare",
        "- privimage+d-epsilon1-seed3: missing: not started",
        "- dpdm-epsilon10-seed3: failed: data.sensitive.path: not there",
        "- dpdm-epsilon1-seed0: stopped: before synthesize was finished; run the experiment again to go on",
        "- dpdm-epsilon1-seed3: missing: not started",
    ]
    assert (
        "seed 3 failed: data.sensitive.path: not there"
        in (tmp_path / "runs" / f"{path.stem}.csv").read_text()
    )


def test_results_of_other_settings_are_a_gap(path: Path) -> None:
    for run in load(path).all_runs():
        finish(run, 70.0)
    edited(path, "synthesize.samples=30", "synthesize.samples=31")
    states = {result.state.description for result in gather(load(path)).results}
    assert len(states) == 8
    assert all("was made with other settings (synthesize.samples was 30, now 31)" in told for told in states)


def test_results_of_settings_that_were_chosen_count(path: Path) -> None:
    """What is `auto` in the file has a value in the run."""
    edited(path, "synthesize.samples=30", "synthesize.samples=auto")
    for run in load(path).all_runs():
        finish(run, 50.0)
        kept = RunDir(run.config.run.dir).path / "config.yaml"
        kept.write_text(kept.read_text().replace("samples: auto", "samples: 500"))
    assert {state_of(run).kind for run in load(path).all_runs()} == {"finished"}


def test_without_any_run_the_table_says_so(path: Path) -> None:
    text = table.write(path)
    assert "0 of 8 runs" in text
    assert text.count("missing: not started") == 8


def test_all_numbers_of_a_report_can_be_tabulated_and_no_others() -> None:
    """The list of keys and the sections of the report, against each other.

    A real report is compared end to end.
    """
    assert {key.split(".")[0] for key in report.NUMBERS} >= {
        "accuracy",
        "fidelity",
        "semantics",
        "resources",
        "memorization",
        "privacy",
    }
    assert len(set(report.NUMBERS)) == len(report.NUMBERS)


def test_what_is_computed_on_sensitive_images_is_marked_wherever_a_table_shows_it(
    path: Path, tmp_path: Path
) -> None:
    """Accuracy and distance are, the time of a public stage is not; what is not declared public is."""
    text = table.write(path)
    assert "| method | LR (%) ↑ † | FD ↓ † | time (min) |" in text and table.NOTE in text
    with open(tmp_path / "runs" / f"{path.stem}.csv") as file:
        marked = {line["measure"]: line["sensitive"] for line in csv.DictReader(file)}
    assert marked == {"LR": "yes", "FD": "yes", "time": "no"}
    assert {key for key in report.NUMBERS if not Measure(key=key).sensitive} == {
        *(
            f"resources.{stage}.{name}"
            for stage in ("prepare", "query", "pretrain")
            for name in report.MEASURED
        ),
        *("agreement.percent", "privacy.epsilon", "privacy.delta", "selection.images", "parameters"),
    }


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of Python that a test writes; it is called with ``-m privimage run ...``."""
    program = tmp_path / "program"
    program.touch(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield program
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_failed_run_does_not_end_the_others(
    path: Path, stand_in: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    stand_in.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\ncase "$*" in *dpdm-epsilon10-seed0*) kill -9 $$ ;; '
        "*epsilon1-seed*) exit 2 ;; esac\n"
    )
    finish(load(path).all_runs()[0], 70.0)
    assert execute.execute(path, ["runtime.threads=2"]) == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 7  # the finished one is skipped
    assert all(
        call.startswith(f"-m privimage run {TINY} ") and call.endswith(" runtime.threads=2") for call in calls
    )
    said = capfd.readouterr().err
    assert "[1/8] privimage+d-epsilon10-seed0: done before" in said
    assert "3 of 8 runs are finished" in said
    assert "dpdm-epsilon10-seed0: failed: killed by SIGKILL; out of memory?" in said
    assert state_of(load(path).all_runs()[2]).description == "failed: killed by SIGKILL; out of memory?"


def test_a_request_to_stop_reaches_the_run_and_ends_the_experiment(
    path: Path, stand_in: Path, tmp_path: Path
) -> None:
    lines = (
        f"trap 'echo stopped >>{tmp_path}/calls; exit 75' TERM",
        f"echo started >>{tmp_path}/calls",
        "kill -USR2 $PPID",
        "while true; do sleep 0.1; done",
    )
    stand_in.write_text("\n".join(["#!/bin/sh", *lines]))
    assert execute.execute(path) == 75
    assert (tmp_path / "calls").read_text() == "started\nstopped\n"


def test_a_run_that_cannot_save_yet_when_it_is_stopped_is_no_failure(path: Path, stand_in: Path) -> None:
    stand_in.write_text(
        "#!/bin/sh\nkill -USR2 $PPID\nexec sleep 60\n"
    )  # as Python while it still loads its modules
    assert execute.execute(path) == 75
    assert state_of(load(path).all_runs()[0]).kind == "missing"


def test_a_sweep_of_an_experiment_shares_its_public_stages(path: Path) -> None:
    variants = jobs.expand([str(path), "runtime.threads=2"])
    runs = load(path).all_runs(["runtime.threads=2"])
    assert variants == [(run.path, run.overrides) for run in runs]
    # epsilon 10 trains the query for epsilon 1; DPDM has no public stage to wait for
    first, second = jobs.waves([run.config for run in runs])
    assert [runs[at].name for at in second] == ["privimage+d-epsilon1-seed0", "privimage+d-epsilon1-seed3"]
    assert sorted([*first, *second]) == list(range(8))
    with pytest.raises(UserError, match="an experiment is submitted alone"):
        jobs.expand([str(path), str(TINY)])
