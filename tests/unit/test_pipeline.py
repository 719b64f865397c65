"""The order of the stages, what is skipped, what is recorded, and how a run ends."""

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import TINY

from privimage import cli
from privimage.config import Config, load
from privimage.config.methods import METHODS
from privimage.distributed import precision
from privimage.distributed.preemption import stop
from privimage.errors import Stopped, UserError
from privimage.runs import pipeline
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Stages of the test's own in place of the real ones, by name; the others note that they ran."""
    ran: list[str] = []
    own: dict = {"ran": ran}

    def stand_in(stage: str) -> Callable:
        def run(*arguments) -> dict:
            ran.append(stage)
            return own.get(
                stage, lambda *_: {"images": 10, "count": 960, "classes": list(map(str, range(48)))}
            )(*arguments)

        return run

    for stage in METHODS["privimage+d"].stages:
        monkeypatch.setitem(
            sys.modules, f"privimage.stages.{stage}", types.SimpleNamespace(run=stand_in(stage))
        )
    return own


def test_the_stages_of_the_method_run_in_order_and_finished_ones_are_skipped(
    tiny_config: Config, stages: dict
):
    write_json(RunDir(tiny_config.run.dir).stage("query") / "done.json", {"images": 1})
    assert pipeline.run(tiny_config) == 0
    assert stages["ran"] == ["prepare", "select", "pretrain", "finetune", "synthesize", "evaluate"]
    assert pipeline.run(tiny_config) == 0
    assert len(stages["ran"]) == 6


def test_a_stage_is_recorded_with_time_and_memory(tiny_config: Config, stages: dict):
    stages["prepare"] = lambda config, run, world: {"images": 10, "kept": 7}
    assert pipeline.run(tiny_config, ["prepare"]) == 0
    record = read_json(tiny_config.run.dir / "prepare" / "done.json")
    assert (record["images"], record["kept"], record["ranks"]) == (10, 7, 1)
    assert record["images_per_second"] == pytest.approx(10 / record["seconds"], rel=0.5)
    assert record["peak_memory_bytes"] > 50e6


def test_the_peak_of_memory_is_that_of_the_stage(tiny_config: Config, stages: dict):
    def hungry(config, run, world):
        return {"images": len(bytearray(300_000_000)) and 1}

    stages["prepare"] = hungry
    assert pipeline.run(tiny_config, ["prepare", "query"]) == 0
    peaks = [
        read_json(tiny_config.run.dir / name / "done.json")["peak_memory_bytes"]
        for name in ("prepare", "query")
    ]
    assert peaks[0] > peaks[1] + 200e6


def test_a_mistake_is_told_in_one_line_and_the_status_is_2(
    tiny_config: Config, stages: dict, capfd: pytest.CaptureFixture
):
    def mistaken(config, run, world):
        raise UserError("data.public.path: not there")

    stages["query"] = mistaken
    assert pipeline.run(tiny_config) == 2
    assert "privimage: error: data.public.path: not there\n" in capfd.readouterr().err
    assert stages["ran"] == ["prepare", "query"]


def test_settings_of_a_stage_that_failed_before_it_did_anything_may_be_mended(
    tiny_config: Config, stages: dict, tmp_path: Path
):
    def mistaken(config, run, world):
        run.stage("prepare")
        raise UserError("data.public.path: not there")

    stages["prepare"] = mistaken
    assert pipeline.run(tiny_config) == 2
    del stages["prepare"]
    assert pipeline.run(load(TINY, [f"run.dir={tiny_config.run.dir}", "data.resolution=16"])) == 0


def test_an_error_that_nobody_foresaw_shows_where_it_happened_and_the_status_is_1(
    tiny_config: Config, stages: dict, capfd: pytest.CaptureFixture
):
    stages["prepare"] = lambda config, run, world: 1 // 0
    assert pipeline.run(tiny_config) == 1
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError" in told


def test_a_stopped_run_has_status_75_and_goes_on(
    tiny_config: Config, stages: dict, capfd: pytest.CaptureFixture
):
    def stopped(config, run, world):
        (run.stage("prepare") / "half").touch()
        raise Stopped("prepare: saved")

    stages["prepare"] = stopped
    assert pipeline.run(tiny_config) == 75
    assert "privimage: stopped: prepare: saved\n" in capfd.readouterr().err
    first = read_json(tiny_config.run.dir / "prepare" / "elapsed.json")["seconds"]
    del stages["prepare"]
    assert pipeline.run(tiny_config) == 0
    assert read_json(tiny_config.run.dir / "prepare" / "done.json")["seconds"] > first


def test_a_signal_between_two_stages_ends_the_run_before_the_next(tiny_config: Config, stages: dict):
    def signalled(config, run, world):
        os.kill(os.getpid(), signal.SIGUSR2)
        return {"images": 1}

    stages["query"] = signalled
    assert pipeline.run(tiny_config) == 75
    assert stop.requested
    assert stages["ran"] == ["prepare", "query"]


def test_a_second_run_in_the_same_directory_is_refused(
    tiny_config: Config, stages: dict, capfd: pytest.CaptureFixture
):
    with RunDir(tiny_config.run.dir).lock():
        assert pipeline.run(tiny_config) == 2
    assert "another run is using this directory" in capfd.readouterr().err
    assert stages["ran"] == []


def test_a_stage_that_the_method_does_not_have_is_refused(
    tiny_config: Config, stages: dict, capfd: pytest.CaptureFixture
):
    config = load(TINY, ["method=dpdm", f"run.dir={tiny_config.run.dir}"])
    assert pipeline.run(config, ["query"]) == 2
    assert "dpdm has no stage query; it runs finetune, synthesize, evaluate" in capfd.readouterr().err


def test_the_plan_is_fixed_when_the_query_has_drawn_from_it(
    tiny_config: Config, stages: dict, capfd: pytest.CaptureFixture
):
    def select(config, run, world):
        write_json(run.private / "account.json", {})
        return {"images": 1}

    stages["select"] = select
    assert pipeline.run(tiny_config, ["select"]) == 0
    assert pipeline.run(load(TINY, [f"run.dir={tiny_config.run.dir}", "finetune.steps=9"]), ["finetune"]) == 2
    assert "finetune.steps was 8, now 9" in capfd.readouterr().err
    assert not RunDir(tiny_config.run.dir).clashes(
        load(TINY, [f"run.dir={tiny_config.run.dir}", "finetune.checkpoint_every=9"])
    )


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable:
    """`command("run", ...)` is the exit status, standard output and standard error of `privimage run ...`."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["privimage", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("run", "nothing.yaml"), "nothing.yaml: no such configuration file"),
        (("run", str(TINY), "finetune.step=3"), "finetune.step: unknown setting (did you mean 'steps'?)"),
        (("run", str(TINY), "privacy.epsilon=0"), "privacy.epsilon: input should be greater than 0, not 0"),
        (("report", "nowhere"), "nowhere"),
        (("privacy", "nowhere"), "nowhere"),
    ],
)
def test_the_command_tells_mistakes_in_one_line_with_status_2(
    command: Callable, arguments: tuple[str, ...], told: str
):
    status, _, err = command(*arguments)
    assert status == 2
    assert err.startswith("privimage: error: ")
    assert told in err
    assert err.count("\n") == 1


def test_a_command_that_does_not_exist_has_status_2(command: Callable):
    assert command("fine-tune", str(TINY))[0] == 2


def test_methods_are_listed(command: Callable):
    status, out, _ = command("methods")
    assert status == 0
    assert all(name in out for name in METHODS)


def test_the_command_ends_with_the_status_of_the_pipeline(command: Callable, stages: dict, tmp_path: Path):
    assert command("prepare", str(TINY), f"run.dir={tmp_path}")[0] == 0
    stages["query"] = lambda config, run, world: 1 // 0
    assert command("run", str(TINY), f"run.dir={tmp_path}")[0] == 1
    assert stages["ran"] == ["prepare", "query"]


def test_ranks_that_torchrun_starts_again_after_a_mistake_end_at_once_with_its_status(
    command: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("PRIVIMAGE_STATUS_FILE", str(tmp_path / "status"))
    assert command("run", "nothing.yaml")[0] == 2
    assert (tmp_path / "status").read_text() == "2\n"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert command("run", "nothing.yaml") == (2, "", "")


@pytest.mark.parametrize(("fast", "found"), [(False, "fp32"), (True, "bf16")])
def test_precision_is_by_default_that_of_the_device(
    fast: bool, found: str, tmp_path: Path, stages: dict, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precision, "faster_in_bf16", lambda device: fast)
    seen = []
    stages["prepare"] = lambda config, run, world: (
        seen.append((config.runtime.precision, config.finetune.precision)) or {"images": 1}
    )
    folder = tmp_path / "run"
    assert pipeline.run(load(TINY, [f"run.dir={folder}"]), ["prepare"]) == 0
    assert seen == [(found, found)]
    # The run may go on with another kind of machine.
    assert load(folder / "config.yaml").runtime.precision == "auto"


def test_a_cpu_computes_in_fp32_by_default() -> None:
    assert not precision.faster_in_bf16(torch.device("cpu"))


def test_a_precision_that_was_chosen_stays(tmp_path: Path, stages: dict):
    seen = []
    stages["prepare"] = lambda config, run, world: (
        seen.append((config.runtime.precision, config.finetune.precision)) or {"images": 1}
    )
    chosen = [f"run.dir={tmp_path}/run", "runtime.precision=bf16", "finetune.precision=bf16"]
    assert pipeline.run(load(TINY, chosen), ["prepare"]) == 0
    assert seen == [("bf16", "bf16")]


def test_the_command_answers_before_the_long_imports() -> None:
    """Help and completion need neither torch nor the readers of YAML; a bound on seconds would be noise."""
    seen = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, privimage, privimage.cli as cli\n"
            "try: cli.app(['--help'])\n"
            "except SystemExit: pass\n"
            "print([name for name in ('torch', 'numpy', 'pydantic', 'omegaconf') if name in sys.modules])",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "finetune" in seen.stdout
    assert seen.stdout.splitlines()[-1] == "[]"


def test_a_rank_does_not_import_what_its_stage_may_not_need() -> None:
    """dp-accounting is for plans and statements, Opacus for private steps, SciPy draws characters."""
    heavy = ("dp_accounting", "opacus", "scipy", "sklearn", "matplotlib", "tensorboard")
    code = f"import sys, privimage.runs.pipeline; print([n for n in {heavy!r} if n in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines()[-1] == "[]"
