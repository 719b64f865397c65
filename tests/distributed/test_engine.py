"""Pretraining engines on real gloo processes.

They train alike, and a state goes from any of them to any other.
"""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch import nn

from privimage.config import load
from privimage.distributed import checkpoint
from privimage.distributed.deepspeed_engine import deepspeed_settings
from privimage.distributed.engine import DDPEngine, adam, make_engine
from privimage.distributed.world import World
from privimage.errors import UserError

TINY = Path(__file__).parent.parent / "tiny.yaml"
SHIPPED = Path(__file__).parent.parent.parent / "configs" / "deepspeed"
ALONE = World(0, 0, 1, 1, torch.device("cpu"))

TRAINING = """
import sys, torch
from pathlib import Path
from torch import nn
from privimage.config import load
from privimage.distributed import checkpoint
from privimage.distributed.engine import make_engine
from privimage.distributed.world import connect

def train(config, world, begin, end, state=None, at_once=12):
    torch.manual_seed(7)
    first, last = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 1, 3, padding=1)
    module = nn.Sequential(first, nn.GroupNorm(2, 6), nn.SiLU(), last)
    engine = make_engine(config, module, world)
    if state:
        engine.load(state)
    for step in range(begin, end):
        random = torch.Generator().manual_seed(step)
        images = torch.randn(12, 1, 8, 8, generator=random)[world.rank :: world.size]
        def loss(piece):
            return (engine.forward(images[piece]) - images[piece].roll(1, 3)).square().mean()
        engine.update(loss, len(images), at_once)
    return engine.state()
"""
MANY = """
folder, jobs = Path(sys.argv[1]), sys.argv[2:]
def config(engine):
    return load(folder / "tiny.yaml", [f"run.dir={folder}/run", "pretrain.batch_size=12"] + (
        ["pretrain.engine=ddp"] if engine == "ddp"
        else ["pretrain.engine=deepspeed", f"pretrain.deepspeed_config={folder}/{engine}.json"]))
world = connect(config("ddp").runtime)
for job in jobs:
    engine, begin, end, start_from, result, *at_once = job.split(":")
    start = checkpoint.load(folder / start_from) if start_from else None
    state = train(config(engine), world, int(begin), int(end), start, int(at_once[0]) if at_once else 12)
    if world.is_main:
        checkpoint.save(folder / result, state)
    del state
    world.barrier()
world.close()
"""
ENGINES = ("ddp", "zero0", "zero1", "zero2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of six steps.

    On one rank undisturbed (`alone`), on two ranks stopped after three and resumed by each engine.
    """
    path = tmp_path_factory.mktemp("engines")
    (path / "tiny.yaml").write_text(TINY.read_text())
    (path / "bf16.json").write_text((SHIPPED / "zero1.json").read_text())
    for stage in range(3):
        (path / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    halves = [f"{engine}:0:3::half-{engine}" for engine in ENGINES]
    resumed = [f"{engine}:3:6:half-{engine}:{engine}" for engine in ENGINES]
    in_pieces = [f"{engine}:0:6::pieces-{engine}:4" for engine in ENGINES]
    moved = [
        f"{to}:3:6:half-{engine}:{engine}-{to}"
        for engine, to in (("ddp", "zero2"), ("zero1", "ddp"), ("zero2", "zero0"), ("zero0", "zero1"))
    ]
    for size, jobs in (
        (1, ["ddp:0:6::alone"]),
        (2, [*halves, *resumed, *moved, *in_pieces, "bf16:0:6::bf16"]),
        (3, ["zero2:3:6:half-ddp:ddp-zero2-3", "ddp:3:6:half-zero1:zero1-ddp-3"]),
    ):
        for ended in run_ranks(TRAINING + MANY, size, str(path), *jobs):
            assert ended.status == 0, ended.err
    return path


@pytest.mark.parametrize(
    "result",
    [*ENGINES, "ddp-zero2", "zero1-ddp", "zero2-zero0", "zero0-zero1", "ddp-zero2-3", "zero1-ddp-3"]
    + [f"pieces-{engine}" for engine in ENGINES],
)
def test_a_resumed_training_ends_like_an_undisturbed_one_on_one_rank(folder: Path, result: str):
    state, expected = checkpoint.load(folder / result), checkpoint.load(folder / "alone")
    assert state and expected
    assert state["step"] == expected["step"] == 6
    for key in ("module", "exp_avg", "exp_avg_sq"):  # equal up to the order in which floats are added up
        torch.testing.assert_close(state[key], expected[key], rtol=2e-4, atol=2e-6)


def test_the_weights_stay_fp32_in_bf16_training(folder: Path):
    state, expected = checkpoint.load(folder / "bf16"), checkpoint.load(folder / "alone")
    assert state and expected
    for name, value in state["module"].items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected["module"][name], rtol=0.02, atol=0.002)
    assert not torch.equal(state["module"]["0.weight"], state["module"]["0.weight"].bfloat16().float())


def test_a_fresh_engine_has_done_no_updates():
    engine = DDPEngine(module := nn.Linear(2, 2), adam(module, 1e-3), ALONE, bf16=False)
    state = engine.state()
    assert (state["step"], state["exp_avg"]) == (0, {})
    engine.load(state)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage"),
        ({"optimizer": {"type": "SGD"}}, "optimizer"),
        ({"bf16": {"enabled": True}}, "torch_autocast"),
        ({"gradient_clipping": 1.0}, "gradient_clipping"),
    ],
)
def test_deepspeed_settings_that_would_change_the_training_are_refused(
    tmp_path: Path, settings: dict, names: str
):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    with pytest.raises(UserError, match=names) as told:
        deepspeed_settings(path, 4, bf16=False)
    assert str(path) in str(told.value)


def test_a_damaged_deepspeed_file_is_named(tmp_path: Path):
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(UserError, match=r"ds\.json"):
        deepspeed_settings(tmp_path / "ds.json", 4, bf16=False)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_deepspeed_files_are_accepted(path: Path):
    assert deepspeed_settings(path, 4, bf16=False)["torch_autocast"]["enabled"]


def test_without_deepspeed_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    config = load(TINY, ["pretrain.engine=deepspeed", f"run.dir={tmp_path}"])
    with pytest.raises(UserError, match=r"privimage\[cluster\]"):
        make_engine(config, nn.Linear(2, 2), ALONE)
