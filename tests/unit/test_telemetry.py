"""What a run shows of itself: scalars as JSON lines, speed, operations, a profiled window."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from privimage.config import Config
from privimage.distributed.world import ALONE
from privimage.runs import pipeline
from privimage.stages import training
from privimage.stages.training import Schedule, Watched
from privimage.telemetry import flops, memory
from privimage.telemetry.curves import LINES, Curves, points


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / LINES).read_text().splitlines()]


def test_scalars_are_also_lines_of_json_without_double_points_after_a_restart(tmp_path: Path) -> None:
    curves = Curves(tmp_path, "pretrain", 0, shown=True)
    for step in (1, 2, 3, 4):
        curves.scalars(step, {"loss": 1 / step})
    curves.close()
    with (tmp_path / "pretrain" / LINES).open("a") as file:
        file.write('{"step": 5, "lo')  # cut off by a kill
    curves = Curves(tmp_path, "pretrain", 2, shown=True)
    curves.scalars(3, {"loss": 0.3})
    curves.close()
    assert lines(tmp_path / "pretrain") == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.3},
    ]
    assert points(tmp_path / "pretrain", "loss")[0] == [1, 2, 3]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    curves = Curves(tmp_path, "pretrain", 0, shown=False)
    curves.scalars(1, {"loss": 1.0})
    curves.close()
    assert not list(tmp_path.iterdir())


def test_operations_of_a_training_step_are_three_forward_passes() -> None:
    """A product of (n, 5) and (5, 7) has 2 x 5 x 7 operations per row."""
    layer = nn.Linear(5, 7, bias=False)
    assert flops.of_training(lambda images: layer(torch.zeros(images, 5))) == 3 * 2 * 5 * 7
    assert flops.peak(torch.device("cpu")) is None


def test_speed_is_that_since_the_last_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by hand: 10 steps of 8 images in 4 s, of which 1 s was waiting, then 5 in 1 s."""
    clock, waited = [0.0], [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    watched = Watched(waited=lambda: waited[0], operations=2e11)
    speed = training._Speed(Schedule(100, 8, 10, 10), watched, ALONE, first=20)
    clock[0], waited[0] = 4.0, 1.0
    first = speed.since_last(30)
    clock[0] = 5.0
    second = speed.since_last(35)
    assert first == {"images per second": 20, "share of time waiting for data": 0.25, "TFLOP per second": 4}
    assert (second["images per second"], second["share of time waiting for data"]) == (40, 0)


def test_a_window_of_steps_is_profiled(tiny_config: Config) -> None:
    runtime = tiny_config.runtime.model_copy(update={"profile": (3, 4)})
    config = tiny_config.model_copy(update={"runtime": runtime, "method": "pdp-diffusion"})
    assert pipeline.run(config, ["prepare"]) == 0 and pipeline.run(config, ["pretrain"]) == 0
    (trace,) = (config.run.dir / "tensorboard" / "pretrain" / "profile").glob("*.pt.trace.json.gz")
    assert b"conv" in gzip.decompress(trace.read_bytes())
    shown = lines(config.run.dir / "tensorboard" / "pretrain")
    assert [line["step"] for line in shown] == [4, 8, 12, 16, 20, 24]
    assert all({"loss", "images per second", "TFLOP per second", "memory"} <= set(line) for line in shown)


def test_memory_that_is_left_is_within_the_limits_of_the_process() -> None:
    assert 0 < memory.available() <= memory.total()
    script = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (3 << 30,) * 2)\n"
    script += "from privimage.telemetry import memory; print(memory.total(), memory.available())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    total, left = map(int, done.stdout.split())
    assert total <= 3 << 30 and left < total
