"""Clusters and votes on real gloo processes: the same for any number of ranks, to the bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import TINY, run_ranks

from privimage.config import load
from privimage.distributed.world import World
from privimage.stages import prepare, query
from privimage.storage.rundir import RunDir

SETTINGS = (
    "data.public.images_per_class=30",
    "data.public.labelled=false",
    "query.semantics=clusters",
    "query.clusters=20",
    "privacy.insecure_fixed_key=7",
)
SCRIPT = """
import sys, numpy as np, torch
from pathlib import Path
from privimage.config import load
from privimage.data.sources import open_sensitive
from privimage.distributed.world import connect
from privimage.stages.public_set import load_scores, public_labels
from privimage.storage.rundir import RunDir
from privimage.stages import query, select

tiny, folder, *settings = sys.argv[1:]
config = load(tiny, [f"run.dir={folder}", *settings])
world, run = connect(config.runtime), RunDir(config.run.dir)
names = query._clustered(config, run, world, public_labels(run))
world.barrier()
if world.is_main:
    run.finish("query", {"images": 1, "clusters": names})
world.barrier()
images = open_sensitive(config, "train", world, run.sensitive).images
votes = select.top_votes(load_scores(config, run, world), images, 3, world)
np.save(f"{folder}/votes-{world.rank}.npy", votes)
select.run(config, run, world)
world.close()
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Run directories that one trained network was put into, with clusters, votes and selection made by 1, 2
    and 3 ranks.
    """
    root = tmp_path_factory.mktemp("semantics")
    config = load(TINY, [f"run.dir={root / 'trained'}", *SETTINGS])
    run = RunDir(config.run.dir)
    run.finish("prepare", prepare.run(config, run, World(0, 0, 1, 1, torch.device("cpu"))))
    query.run(config, run, World(0, 0, 1, 1, torch.device("cpu")))
    (run.path / "query" / "clusters.npz").unlink()
    made = {}
    for size in (1, 2, 3):
        made[size] = root / str(size) / "run"  # each with ledgers of its own
        shutil.copytree(run.path, made[size])
        for ended in run_ranks(SCRIPT, size, str(TINY), str(made[size]), *SETTINGS, seconds=600):
            assert ended.status == 0, ended.err
    return made


def contents(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["query/clusters.npz", "select/selection.npz"])
def test_what_is_written_does_not_depend_on_the_ranks(folders: dict[int, Path], size: int, name: str) -> None:
    alone, shared = contents(folders[1] / name), contents(folders[size] / name)
    for key, value in alone.items():
        assert np.array_equal(value, shared[key]), key


@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_the_votes_of_one_alone(folders: dict[int, Path], size: int) -> None:
    alone = np.load(folders[1] / "votes-0.npy")
    assert alone.shape == (1437, 3)
    assert len(np.unique(alone)) > 5
    for rank in range(size):
        assert np.array_equal(np.load(folders[size] / f"votes-{rank}.npy"), alone)
