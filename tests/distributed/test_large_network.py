"""A small twin of a network of hundreds of millions of parameters.

It trains with its optimizer shared out by ZeRO and its activations computed again, as without either.
"""

import json
from pathlib import Path

import pytest
import torch
from ranks import TINY, run_ranks

from privimage.distributed import checkpoint

# model.width=384 has 250 million parameters with these multipliers at 32x32; the twin has width 8.
TWIN = ("model.width=8", "model.multipliers=[1,2,2,2]", "model.attention=[4]", "pretrain.batch_size=8")
TRAINING = """
import sys
from pathlib import Path
import torch
from privimage.config import load
from privimage.distributed import checkpoint
from privimage.distributed.world import connect
from privimage.families.denoising import DiffusionPublic

folder, tiny, *settings = sys.argv[1:]
world = None
for name, changed in (
    ("ddp", []),
    ("recompute", ["pretrain.recompute=true"]),
    ("zero1", ["pretrain.recompute=true", "pretrain.engine=deepspeed"]),
    ("zero2", ["pretrain.recompute=true", "pretrain.engine=deepspeed",
               f"pretrain.deepspeed_config={folder}/zero2.json"]),
):
    config = load(tiny, [f"run.dir={folder}/run", *settings, *changed])
    world = world or connect(config.runtime)
    training = DiffusionPublic(config, 10, world)
    assert training.denoiser.network.recompute is ("pretrain.recompute=true" in changed)
    for step in range(4):
        random = torch.Generator().manual_seed(10 * step + world.rank)
        images = torch.randint(0, 256, (4, 1, 8, 8), generator=random, dtype=torch.uint8)
        training.step(images, torch.arange(4) % 10, step)
    state = training.state()
    if world.is_main:
        checkpoint.save(Path(folder, name), state | {"loss": training.loss_sum})
    world.barrier()
world.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of four steps on two ranks, by name of what was changed."""
    path = tmp_path_factory.mktemp("large")
    (path / "zero2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    for ended in run_ranks(TRAINING, 2, str(path), str(TINY), *TWIN):
        assert ended.status == 0, ended.err
    return path


@pytest.mark.parametrize("name", ["recompute", "zero1", "zero2"])
def test_a_twin_of_a_large_network_trains_alike_with_zero_and_recomputed_activations(
    folder: Path, name: str
) -> None:
    state, plain = checkpoint.load(folder / name), checkpoint.load(folder / "ddp")
    assert state and plain
    assert state["engine"]["step"] == plain["engine"]["step"] == 4
    for part in ("module", "exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state["engine"][part], plain["engine"][part], rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(state["ema"], plain["ema"], rtol=2e-3, atol=2e-5)
    assert state["loss"] == pytest.approx(plain["loss"].item(), rel=1e-4)
    assert not torch.equal(plain["engine"]["module"]["network.input.weight"], torch.zeros(8, 1, 3, 3))
