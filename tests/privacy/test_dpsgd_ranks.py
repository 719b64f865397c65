"""The private step on 1 to 4 real gloo processes.

The same total noise, the same update, whatever the number of ranks.
"""

import json

import numpy as np
import pytest
from ranks import run_ranks
from scipy import stats

SCRIPT = """
import hashlib, json, sys
import torch
from torch import nn
from privimage.config.settings import Runtime
from privimage.data.sensitive import SensitiveSet
from privimage.distributed.world import connect
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import FoldedGradients
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD

mode, steps, count, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
world = connect(Runtime(device="cpu", timeout_minutes=1))
torch.manual_seed(0)
features = 40 if mode == "update" else 3000
module = nn.Sequential(nn.Linear(features, 1, bias=False))
nn.init.zeros_(module[0].weight)
plan = DPSGD(
    count=count,
    logical_batch_size=batch,
    steps=steps,
    noise_multiplier=2.0,
    max_grad_norm=0.5,
    noise_copies=1,
)
order, batches_seen = [], []
class Losses:
    def draw(self, images, labels, indices, seed):
        order.append("drawn")
        batches_seen.extend(indices.tolist())
        return (images[:, None],)
    def __call__(self, m, x):
        return (0 if mode == "noise" else 1) * m(x.flatten(1).float() / 255).flatten()
random = torch.Generator().manual_seed(1)
images = torch.randint(0, 256, (count, 1, 1, features), dtype=torch.uint8, generator=random).numpy()
def charge(name):
    order.append("charged")
    return mode != "three" or order.count("charged") <= 3
# Weights named alike in all steps: samples are then those of one rank, whatever the rounding.
def state(): return [] if mode == "update" else [module[0].weight]
steps_made = PrivateSteps(
    plan, FoldedGradients(module), Losses(), torch.optim.SGD(module.parameters(), lr=1.0),
    SensitiveSet(images, torch.zeros(count, dtype=torch.int64).numpy(), world.device, "device"), world,
    Randomness(insecure_fixed(5), "aes-ctr", b"test"), physical=3, charge=charge, state=state,
    stop_requested=lambda: world.rank == world.size - 1 and steps_made.step == steps - 1,
    noise_factor=0.0 if mode == "update" else 1.0)
updates, figures, before = [], [], module[0].weight.detach().clone()
if mode == "apart" and world.rank == world.size - 1:
    nn.init.ones_(module[0].weight)
try:
    for found in steps_made:
        updates.append(((before - module[0].weight.detach()) * batch).flatten().tolist())
        before = module[0].weight.detach().clone()
        figures.append([found.images, found.stop])
except Exception as error:
    print(json.dumps({"error": str(error), "drawn": order.count("drawn")}))
    sys.exit(0)
digest = hashlib.sha256(json.dumps(updates).encode()).hexdigest()
shown = updates if world.is_main else []
print(json.dumps({
    "updates": shown, "steps": len(updates), "digest": digest, "figures": figures, "order": order,
    "indices": batches_seen,
}))
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
    """Expected batch 1 on 4 ranks: most local batches are empty, and all ranks make the same 30 steps."""
    found = ranks(4, "update", 30, 40, 1)
    assert [rank["steps"] for rank in found] == [30] * 4
    assert any(images < 4 for images, _ in found[0]["figures"])
    assert len({rank["digest"] for rank in found}) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_total_noise_has_deviation_sigma_c(size: int) -> None:
    """12 x 3000 numbers against N(0, (2.0 x 0.5)^2).

    Kolmogorov-Smirnov and variance, false-alarm rate 1e-3 each, fixed keys.
    """
    draws = np.array(ranks(size, "noise", 12, 60, 20)[0]["updates"]).ravel()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert 5e-4 < stats.chi2.cdf((draws**2).sum(), len(draws)) < 1 - 5e-4


def test_every_step_is_charged_before_anything_of_it_is_computed_and_a_stop_reaches_all(single: dict) -> None:
    found = ranks(3, "update", 10, 60, 20)
    order = [
        event
        for event, before in zip(found[0]["order"], [None, *found[0]["order"]], strict=False)
        if event != before
    ]
    assert order == ["charged", "drawn"] * 10
    for rank in found:
        assert [stop for _, stop in rank["figures"]] == [False] * 9 + [True]
    assert all("charged" not in rank["order"] for rank in found[1:])


@pytest.mark.parametrize("size", [1, 2])
def test_where_no_further_step_may_be_charged_all_ranks_end(size: int) -> None:
    assert [rank["steps"] for rank in ranks(size, "three", 10, 60, 20)] == [3] * size


def test_ranks_with_other_weights_are_named_before_anything_is_drawn() -> None:
    """As from a checkpoint that was copied to the disk of one node only."""
    for rank in ranks(3, "apart", 10, 60, 20):
        assert (
            "the weights before private step 1 are not the same on all ranks: rank 2 differ from rank 0"
            in rank["error"]
            and not rank["drawn"]
        )
