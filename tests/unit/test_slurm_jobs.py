"""What the jobs of a pipeline and of a sweep ask for, without a cluster."""

import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from ranks import REPOSITORY, TINY, clean_environment

from privimage import cli
from privimage.cluster import jobs
from privimage.cluster.scheduler import Submission
from privimage.cluster.slurm import sbatch_options
from privimage.config import load
from privimage.errors import UserError

SECTION = [
    "slurm.nodes=2",
    "slurm.gpus=4",
    "slurm.time='4:00:00'",
    "slurm.options=[--partition=gpu]",
    "slurm.stages={pretrain: {nodes: 8, cpus: 6}}",
]


def options(stage: str, *overrides: str, **environ: str) -> list[str]:
    config = load(TINY, [*SECTION, *overrides])
    return sbatch_options(config, Submission(stage, Path("log"), (), config.slurm.of(stage, environ)))


def test_a_stage_asks_for_what_all_stages_do_unless_it_says_otherwise():
    assert {
        "--nodes=2",
        "--gpus-per-node=4",
        "--ntasks-per-node=4",
        "--time=4:00:00",
        "--partition=gpu",
    } <= set(options("finetune"))
    assert {"--nodes=8", "--gpus-per-node=4", "--cpus-per-task=6"} <= set(options("pretrain"))


def test_the_environment_goes_before_the_configuration_and_a_stage_before_all():
    assert {"--nodes=8", "--gpus-per-node=1"} <= set(options("pretrain", NODES="3", PRETRAIN_GPUS="1"))
    assert "--nodes=3" in options("finetune", NODES="3")
    assert {"--nodes=5", "--gpus-per-node=4"} <= set(
        options("finetune", NODES="3", FINETUNE_NODES="5", PRETRAIN_GPUS="1")
    )


def test_without_gpus_there_is_one_rank_a_node_unless_told_otherwise():
    assert "--ntasks-per-node=1" in options("prepare", "slurm.gpus=0")
    assert "--ntasks-per-node=16" in options("prepare", "slurm.gpus=0", RANKS="16")
    assert not any(option.startswith("--gpus") for option in options("prepare", "slurm.gpus=0"))


def test_a_time_without_quotes_is_told():
    with pytest.raises(UserError, match=r"slurm\.time: put it in quotes"):
        options("finetune", "slurm.time=4:00:00")


@pytest.mark.parametrize("environ", [{"NODES": "two"}, {"FINETUNE_TIME": "soon"}, {"MEMORY": "lots"}])
def test_what_cannot_be_asked_for_is_told(environ: dict[str, str]):
    with pytest.raises(UserError, match=f"finetune: .*{next(iter(environ.values()))}"):
        options("finetune", **environ)


def test_a_sweep_has_a_run_directory_for_each_combination():
    variants = jobs.expand(
        [
            str(TINY),
            "privacy.epsilon=1,10",
            "run.dir=runs/a",
            "finetune.steps=4,8",
            "evaluate.classifiers=[lr,mlp]",
        ]
    )
    assert [overrides[-1] for _, overrides in variants] == [
        f"run.dir=runs/a-epsilon{e}-steps{s}" for e in (1, 10) for s in (4, 8)
    ]
    assert all(load(path, overrides).evaluate.classifiers == ("lr", "mlp") for path, overrides in variants)
    assert [load(path, overrides).privacy.epsilon for path, overrides in variants] == [1, 1, 10, 10]


def test_configurations_are_swept_as_they_are(tmp_path: Path):
    assert jobs.expand(["a.yaml", "b.yaml"]) == [(Path("a.yaml"), ()), (Path("b.yaml"), ())]


def test_a_sweep_whose_runs_would_share_a_directory_is_refused():
    with pytest.raises(UserError, match=r"run\.dir"):
        jobs.sweep([str(TINY), str(TINY)])


def sbatch(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command of that name which does what `text` says."""
    (folder / "sbatch").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "sbatch").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_sweep_whose_stages_ask_for_different_resources_is_an_array_for_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Two methods, of which one has no pretraining; a task waits for the task of its own run."""
    log = tmp_path / "calls"
    sbatch(tmp_path, f'echo "$@" >>{log}; wc -l <{log}', monkeypatch)
    words = [
        str(TINY),
        "method=dpdm,pdp-diffusion",
        f"run.dir={tmp_path / 'run'}",
        "slurm.stages={finetune: {gpus: 2}}",
    ]
    jobs.submit(words, sweeps=True)
    prepare, pretrain, finetune, *_, evaluate, summary = log.read_text().splitlines()
    assert "--array=0-1" in prepare and "--dependency" not in prepare and "gpus" not in prepare
    assert "--dependency=aftercorr:1 --kill-on-invalid-dep=yes" in pretrain
    assert "--dependency=aftercorr:2" in finetune and "--gpus-per-node=2" in finetune
    assert "--dependency=aftercorr:4" in evaluate and "--dependency=afterany:5" in summary
    tasks = [Path(line.split()[-1]).read_text().splitlines() for line in (prepare, finetune)]
    assert [task.split()[:1] for task in tasks[0]] == [[], ["prepare"]]
    assert [task.split()[0] for task in tasks[1]] == ["finetune", "finetune"]


def test_a_sweep_of_equal_stages_is_one_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    log = tmp_path / "calls"
    sbatch(tmp_path, f'echo "$@" >>{log}; wc -l <{log}', monkeypatch)
    jobs.submit([str(TINY), "method=dpdm", "privacy.epsilon=1,5", f"run.dir={tmp_path / 'run'}"], sweeps=True)
    array, _ = log.read_text().splitlines()
    assert "--array=0-1" in array
    assert [line.split()[0] for line in Path(array.split()[-1]).read_text().splitlines()] == ["run", "run"]


def test_words_of_a_container_and_of_srun_arrive_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the real script: what is quoted stays together."""
    for name, text in (
        ("srun", 'printf "%s\\n" "$@" >"$WORDS"; echo 0 >"$PRIVIMAGE_STATUS_FILE"'),
        ("scontrol", "echo JobState=RUNNING"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(stat.S_IRWXU)
    settings = {
        "CONTAINER": "apptainer exec --bind '/my data:/data' x.sif",
        "SRUN_OPTIONS": shlex.join(["--mpi=none", "--container-image=a b.sqsh"]),
        "PRIVIMAGE_HOME": str(REPOSITORY),
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "here",
        "WORDS": str(tmp_path / "words"),
        "STATUS_FOLDER": str(tmp_path),
    }
    script = str(REPOSITORY / "slurm" / "stage.sbatch")
    env = clean_environment(**settings)
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    # The script puts the repository's own environment first; these commands are in none.
    subprocess.run(
        ["bash", script, "prepare", "my config.yaml", "a=b c"], env=env, check=True, capture_output=True
    )
    words = (tmp_path / "words").read_text().splitlines()
    assert words == [
        *("--kill-on-bad-exit=1", "--mpi=none", "--container-image=a b.sqsh"),
        *("apptainer", "exec", "--bind", "/my data:/data", "x.sif"),
        *("privimage", "prepare", "my config.yaml", "a=b c"),
    ]


def test_what_sbatch_refuses_is_told_in_one_line_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    sbatch(tmp_path, "echo 'sbatch: error: invalid partition specified: gpu' >&2; exit 1", monkeypatch)
    monkeypatch.setattr("sys.argv", ["privimage", "submit", str(TINY), f"run.dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert (ended.value.code, told.count("\n")) == (2, 1)
    assert "prepare: sbatch: error: invalid partition specified: gpu" in told


def test_the_jobs_of_a_pipeline_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    log = tmp_path / "calls"
    sbatch(tmp_path, f'echo "$@" >>{log}; wc -l <{log}', monkeypatch)
    jobs.submit([str(TINY), f"run.dir={tmp_path / 'run'}", "method=dpdm"])
    finetune, synthesize, evaluate, summary = log.read_text().splitlines()
    assert "--dependency" not in finetune
    assert "--dependency=afterok:1 --kill-on-invalid-dep=yes" in synthesize
    assert "--dependency=afterok:2 --kill-on-invalid-dep=yes" in evaluate
    assert "--dependency=afterany:1:2:3" in summary
    assert f"evaluate     job 3  {tmp_path}/run/slurm/evaluate-3.out" in capsys.readouterr().out


def test_without_slurm_the_message_says_where_to_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sbatch: no such command"):
        jobs.pipeline(TINY, [f"run.dir={tmp_path / 'run'}"])
