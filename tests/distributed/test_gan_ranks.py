"""A GAN on 1 to 3 real gloo processes.

Batch norm sees all ranks' images, and both trainings are those of one rank.
"""

import pytest
import torch
from ranks import TINY, run_ranks
from torch import Tensor

SCRIPT = """
import sys
import torch
from torch import nn
from privimage.config import load
from privimage.data.sensitive import SensitiveSet
from privimage.distributed.batch_norm import over_ranks
from privimage.distributed.world import connect
from privimage.families.gan import GanPrivate, GanPublic
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import FoldedGradients
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD

# Small steps: rounding grows quickly in a GAN, since Adam scales up gradients near zero.
sections = {"pretrain": ("learning_rate=1e-5", "batch_size=12", "discriminator_steps=2"),
            "finetune": ("learning_rate=1e-5", "generator_learning_rate=1e-5", "generator_batch_size=12",
                         "discriminator_steps=2")}
settings = [f"{section}.{text}" for section, texts in sections.items() for text in texts]
config = load(sys.argv[1], ["method=privimage+g", "run.dir=unused", *settings])
world = connect(config.runtime)
random = torch.Generator().manual_seed(0)
found = {}

def share(whole):
    return whole.chunk(world.size)[world.rank]

def all_ranks(part):
    parts = torch.zeros(world.size, *part.shape)
    parts[world.rank] = part
    return world.all_reduce_(parts).flatten(0, 1)

# Batch norm: a weighted sum of its outputs, so that no gradient is zero.
norm = nn.Sequential(nn.BatchNorm2d(3))
over_ranks(norm, world)
images = 3 + 2 * torch.randn(12, 3, 4, 4, generator=random)
weights = torch.randn(12, 3, 4, 4, generator=random)
own = share(images).clone().requires_grad_()
out = norm(own)
(out * share(weights)).sum().backward()
gain = world.all_reduce_(norm[0].weight.grad.clone())
statistics = [norm[0].running_mean, norm[0].running_var]
found["batch norm"] = [all_ranks(out.detach()), all_ranks(own.grad), gain, *statistics]

# Public training: four steps of the discriminator, two of the generator.
public = GanPublic(config, 10, world)
for step in range(4):
    batch = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=random)
    public.step(share(batch), share(torch.arange(12) % 10), step)
found["losses"] = public.scalars()
found["public"] = public.state()

# Private training without noise: four private steps, some ranks without an image. Their names leave out
# the weights, whose
# rounding depends on the ranks: the samples would.
private = GanPrivate(config, 10, world, public.weights())
plan = DPSGD(
    count=60, logical_batch_size=5, steps=4, noise_multiplier=0.0, max_grad_norm=0.5, noise_copies=1
)
pictures = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=random).numpy()
data = SensitiveSet(pictures, (torch.arange(60) % 10).numpy(), world.device, "device")
steps = PrivateSteps(plan, FoldedGradients(private.module), private.losses, private.optimizer, data, world,
    Randomness(insecure_fixed(5), "aes-ctr", b"test"), physical=2, charge=lambda name: True, state=lambda: [])
for _ in steps:
    private.after_step(steps.step)
moments = {name: private.optimizer.state[p]["exp_avg"] for name, p in private.module.named_parameters()}
discriminator = {"module": private.module.state_dict(), "exp_avg": moments}
found["private"] = private.state() | {"discriminator": discriminator}
torch.save(found, f"{sys.argv[2]}/{world.size}-{world.rank}")
world.close()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """What each rank has come to, by number of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    for size in (1, 2, 3):
        ended = run_ranks(SCRIPT, size, str(TINY), str(folder), seconds=300)
        assert [rank.status for rank in ended] == [0] * size, ended[0].err[-2000:]
    return {
        size: [torch.load(folder / f"{size}-{rank}", weights_only=True) for rank in range(size)]
        for size in (1, 2, 3)
    }


def flat(tree: dict) -> Tensor:
    """All numbers of a nested state."""
    return torch.cat(
        [
            flat(value) if isinstance(value, dict) else torch.as_tensor(value).double().flatten()
            for value in tree.values()
        ]
    )


@pytest.mark.parametrize("size", [2, 3])
def test_batch_norm_over_ranks_is_that_of_the_whole_batch(found: dict[int, list[dict]], size: int) -> None:
    """Outputs, gradients of inputs and gains, running statistics."""
    for mine, alone in zip(found[size][0]["batch norm"], found[1][0]["batch norm"], strict=True):
        assert torch.allclose(mine, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("training", ["public", "private"])
@pytest.mark.parametrize("network", ["discriminator", "generator"])
def test_the_gradients_of_a_training_on_more_ranks_are_those_of_one(
    found: dict[int, list[dict]], network: str, training: str, size: int
) -> None:
    """Adam's running mean of the gradients of all steps, equal up to float error.

    ReLUs that rounding switches are left room for.
    """
    mine, alone = (flat(found[ranks][0][training][network]["exp_avg"]) for ranks in (size, 1))
    assert alone.norm() > 0.1
    assert (mine - alone).norm() < 0.01 * alone.norm()


@pytest.mark.parametrize("size", [2, 3])
def test_the_losses_are_means_over_the_ranks(found: dict[int, list[dict]], size: int) -> None:
    assert found[size][0]["losses"] == pytest.approx(found[1][0]["losses"], rel=1e-4)


@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_hold_the_same_networks_to_the_bit(found: dict[int, list[dict]], size: int) -> None:
    for training in ("public", "private"):
        first, *others = (flat(rank[training]) for rank in found[size])
        assert all(torch.equal(first, other) for other in others)
