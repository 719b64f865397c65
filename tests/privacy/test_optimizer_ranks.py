"""The private step on 1 to 4 real gloo processes: the same total noise, the same update, whatever the number of ranks."""

import json

import numpy as np
import pytest
from ranks import run_ranks
from scipy import stats

SCRIPT = """
import hashlib, json, sys
import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import nn
from torch.utils.data import DataLoader
from privimage.config import Runtime
from privimage.data.sensitive import SensitiveSet
from privimage.distributed.world import connect
from privimage.privacy.gradients import FoldedGradients
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.noise import NoiseStream
from privimage.privacy.optimizer import PrivateOptimizer
from privimage.privacy.plan import FinetunePlan
from privimage.privacy.sampling import PoissonBatches

mode, steps, count, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
world = connect(Runtime(device="cpu", timeout_minutes=1))
torch.manual_seed(0)
features = 40 if mode == "update" else 3000
module = nn.Sequential(nn.Linear(features, 1, bias=False))
nn.init.zeros_(module[0].weight)
plan = FinetunePlan(count, batch, steps, 2.0, 0.5, 1)
root = insecure_fixed(5)
size = sum(p.numel() for p in module.parameters())
deviation = 0.0 if mode == "update" else plan.noise_multiplier * plan.max_grad_norm / world.size**0.5
noise = NoiseStream(root, "aes-ctr", size, deviation, world.rank, 0)
charged, batches_seen = [], []
sgd = torch.optim.SGD(module.parameters(), lr=1.0)
def stop_requested(): return world.rank == world.size - 1 and len(charged) == steps
optimizer = PrivateOptimizer(sgd, plan, world, noise, 0, charged.append, stop_requested)
images = torch.randint(0, 256, (count, 1, 1, features), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
data = SensitiveSet(images, torch.zeros(count, dtype=torch.int64).numpy(), world.device)
gradients = FoldedGradients(module)
def losses(m, x): return m(x.flatten(1).float() / 255).flatten()
sampler = PoissonBatches(root, "aes-ctr", 0, count, plan.sample_rate, range(steps), world.rank, world.size)
loader = DataLoader(data, batch_sampler=sampler, collate_fn=lambda b: b)
updates, figures = [], []
with BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as physical:
    for x, _, indices in physical:
        batches_seen += indices.tolist()
        if len(x) and mode != "noise":
            optimizer.count_losses(gradients.backward(losses, x[:, None]))
        before = module[0].weight.detach().clone()
        if optimizer.step():
            updates.append(((before - module[0].weight.detach()) * batch).flatten().tolist())
            figures.append([optimizer.figures.images, optimizer.figures.stop])
noise.close()
digest = hashlib.sha256(json.dumps(updates).encode()).hexdigest()
shown = updates if world.is_main else []
print(json.dumps({"updates": shown, "steps": len(updates), "digest": digest, "figures": figures, "charged": charged, "indices": batches_seen}))
world.close()
"""


def ranks(size: int, mode: str, steps: int, count: int, batch: int) -> list[dict]:
    ended = run_ranks(SCRIPT, size, mode, str(steps), str(count), str(batch))
    assert [rank.status for rank in ended] == [0] * size, ended[0].err[-2000:]
    return [json.loads(rank.out.splitlines()[-1]) for rank in ended]


@pytest.fixture(scope="module")
def single() -> dict:
    return ranks(1, "update", 50, 60, 20)[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_without_noise_the_update_is_that_of_one_rank(single: dict, size: int) -> None:
    """50 steps: equal selected sets, equal sums up to float error, on every rank."""
    found = ranks(size, "update", 50, 60, 20)
    assert sorted(i for rank in found for i in rank["indices"]) == sorted(single["indices"])
    assert [images for images, _ in found[0]["figures"]] == [images for images, _ in single["figures"]]
    assert np.allclose(found[0]["updates"], single["updates"], rtol=1e-4, atol=1e-5)
    assert len({rank["digest"] for rank in found}) == 1


def test_ranks_without_images_take_part() -> None:
    """Expected batch 1 on 4 ranks: most local batches are empty, and all ranks still make all 30 steps alike."""
    found = ranks(4, "update", 30, 40, 1)
    assert [rank["steps"] for rank in found] == [30] * 4
    assert any(images < 4 for images, _ in found[0]["figures"])
    assert len({rank["digest"] for rank in found}) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_total_noise_has_deviation_sigma_c(size: int) -> None:
    """12 x 3000 numbers against N(0, (2.0 x 0.5)^2): Kolmogorov-Smirnov and variance, false-alarm rate 1e-3 each, fixed keys."""
    draws = np.array(ranks(size, "noise", 12, 60, 20)[0]["updates"]).ravel()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert 5e-4 < stats.chi2.cdf((draws**2).sum(), len(draws)) < 1 - 5e-4


def test_every_step_is_charged_before_it_is_used_and_a_stop_reaches_all(single: dict) -> None:
    found = ranks(3, "update", 10, 60, 20)
    for rank in found:
        assert rank["charged"] == list(range(10))
        assert [stop for _, stop in rank["figures"]] == [False] * 9 + [True]
