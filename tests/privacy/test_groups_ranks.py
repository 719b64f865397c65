"""Private steps on groups by 1 to 4 real gloo processes: the same groups, the same images, the same sums."""

import json

import numpy as np
import pytest
from ranks import run_ranks

SCRIPT = """
import hashlib, json
import torch
from torch import nn
from privimage.config.settings import Runtime
from privimage.data.sensitive import GroupedSet, SensitiveSet
from privimage.distributed.world import connect
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import FoldedGradients
from privimage.privacy.groups import GroupLosses
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.relation import Relation

world = connect(Runtime(device="cpu", timeout_minutes=1))
random = torch.Generator().manual_seed(1)
groups = torch.randint(0, 40, (150,), generator=random).unique(return_inverse=True)[1].numpy()
images = torch.randint(0, 256, (150, 1, 1, 30), dtype=torch.uint8, generator=random).numpy()
module = nn.Sequential(nn.Linear(30, 1, bias=False))
nn.init.zeros_(module[0].weight)
plan = DPSGD(
    count=40,
    logical_batch_size=12,
    steps=30,
    noise_multiplier=2.0,
    max_grad_norm=0.5,
    noise_copies=1,
    relation=Relation("group"),
    per_group=3,
)
taken = []
class Losses:
    def draw(self, images, labels, indices, seed):
        taken.extend([step.step, group, image] for group, image in zip(indices.tolist(), labels.tolist()))
        scale = torch.tensor([[(seed + group) % 7 / 7] for group in indices.tolist()])
        return images[:, None], scale
    def __call__(self, m, x, scale):
        return scale * m(x.flatten(1).float() / 255).flatten()
data = GroupedSet(SensitiveSet(images, torch.arange(150).numpy(), world.device, "device"), groups, 3)
step = PrivateSteps(
    plan, FoldedGradients(module), GroupLosses(Losses(), 3), torch.optim.SGD(module.parameters(), lr=1.0),
    data, world, Randomness(insecure_fixed(5), "aes-ctr", b"test"), physical=2, charge=lambda name: True,
    state=lambda: [], noise_factor=0.0)
updates, before = [], module[0].weight.detach().clone()
for _ in step:
    updates.append(((before - module[0].weight.detach()) * 12).flatten().tolist())
    before = module[0].weight.detach().clone()
digest = hashlib.sha256(json.dumps(updates).encode()).hexdigest()
print(json.dumps({"updates": updates if world.is_main else [], "digest": digest, "taken": taken}))
world.close()
"""


def ranks(size: int) -> list[dict]:
    ended = run_ranks(SCRIPT, size)
    assert [rank.status for rank in ended] == [0] * size, ended[0].err[-2000:]
    return [json.loads(rank.out.splitlines()[-1]) for rank in ended]


@pytest.fixture(scope="module")
def single() -> dict:
    return ranks(1)[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_groups_are_summed_as_by_one_rank(single: dict, size: int) -> None:
    found = ranks(size)
    assert sorted(one for rank in found for one in rank["taken"]) == sorted(single["taken"])
    assert np.allclose(found[0]["updates"], single["updates"], rtol=1e-4, atol=1e-5)
    assert len({rank["digest"] for rank in found}) == 1


def test_a_group_takes_part_as_a_whole_with_m_images_and_others_in_other_steps(single: dict) -> None:
    by_step: dict[tuple[int, int], list[int]] = {}
    for step, group, image in single["taken"]:
        by_step.setdefault((step, group), []).append(image)
    assert {len(images) for images in by_step.values()} == {3}
    # A group of many images gives others in other steps.
    of_group: dict[int, list[frozenset]] = {}
    for (_, group), images in by_step.items():
        of_group.setdefault(group, []).append(frozenset(images))
    assert any(len(set(chosen)) > 2 for chosen in of_group.values())
    for update in single["updates"]:
        assert np.linalg.norm(update) <= 0.5 * len(of_group)
