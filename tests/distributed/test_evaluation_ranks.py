"""The evaluation on real gloo processes: the ranks share the work and measure what one alone would."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

SCRIPT = """
import sys, numpy as np, torch
from pathlib import Path
from torch import nn
from privimage.config.settings import Runtime
from privimage.distributed.world import connect
from privimage.evaluation import fidelity, utility
from privimage.evaluation.extractor import choose

class Plain(nn.Module):
    # without batch norm, whose statistics are those of a rank's own images
    def __init__(self, channels, n_classes, resolution):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * (resolution - 2) ** 2, n_classes)
    def forward(self, images):
        return self.head(self.trunk(images))

world = connect(Runtime(device="cpu", threads=1, timeout_minutes=1))
random = np.random.default_rng(0)
train = utility.Labelled(random.integers(0, 256, (65, 1, 8, 8), dtype=np.uint8), random.integers(0, 3, 65))
real = utility.train_cnn(train, 3, utility.Training(1, 32, True, 0, world))
utility.resnet9 = Plain
plain = utility.train_cnn(train, 3, utility.Training(3, 32, True, 0, world))
features = fidelity.extract(choose("stand-in", None, Path(".")), train.images, world, "features")
result = {"real": real.state_dict(), "plain": plain.state_dict(), "features": features}
torch.save(result, Path(sys.argv[1]) / f"{world.size}-{world.rank}.pt")
world.close()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What each rank of one, two and three has.

    65 images in batches of 32, so that some ranks have none of the last batch.
    """
    folder = tmp_path_factory.mktemp("evaluation")
    for size in (1, 2, 3):
        for ended in run_ranks(SCRIPT, size, str(folder)):
            assert ended.status == 0, ended.err
    return {path.stem: torch.load(path, weights_only=True) for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize("name", ["real", "plain"])
@pytest.mark.parametrize("size", [2, 3])
def test_all_ranks_have_the_same_network(results: dict[str, dict], name: str, size: int) -> None:
    first, *others = [results[f"{size}-{rank}"][name] for rank in range(size)]
    for other in others:
        assert all(
            torch.equal(value, other[key]) for key, value in first.items() if value.is_floating_point()
        )


@pytest.mark.parametrize("size", [2, 3])
def test_the_network_is_that_of_one_rank(results: dict[str, dict], size: int) -> None:
    alone, shared = results["1-0"]["plain"], results[f"{size}-0"]["plain"]
    for key, value in alone.items():
        torch.testing.assert_close(shared[key], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_features_are_those_of_one_rank_in_the_same_order(results: dict[str, dict], size: int) -> None:
    for rank in range(size):
        torch.testing.assert_close(results[f"{size}-{rank}"]["features"], results["1-0"]["features"])
