"""A noisy statistic of the whole sensitive set: drawn and charged once, kept in a file of its stage."""

import itertools
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.data.private_store import ImageSet
from privimage.distributed import told
from privimage.distributed.blocks import BLOCK
from privimage.distributed.microbatch import block_size
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.privacy.account import Account, charge_name
from privimage.privacy.identity import computation, digest_of_tensors
from privimage.privacy.mechanisms import Mechanism
from privimage.storage.files import write_arrays
from privimage.storage.rundir import RunDir


@dataclass(frozen=True)
class Drawn:
    """A noisy statistic, and the name of the charge that it cost."""

    values: np.ndarray
    charge: str


@dataclass(frozen=True)
class Sensitive:
    """The sensitive set, and the account of the run that draws from it."""

    images: ImageSet
    account: Account
    n_classes: int  # 0 for an unlabelled set

    @property
    def rows(self) -> int:
        """Rows of a statistic by class; an unlabelled set has one."""
        return max(self.n_classes, 1)


def blocks_of_rank(
    world: World, images: ImageSet, places: np.ndarray, size: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's blocks of the set, in turn with the other ranks: images uint8 (B, C, H, W), their `places`
    int64 (B,) of (N,), and their groups int64 (B,).

    A block has all images of its groups: those of which the first is among the next `size` images, group by
    group. Where each image is its own group, B is `size`, or less in the last one.
    """
    order = np.argsort(images.groups, kind="stable")
    groups = images.groups[order]
    first = np.flatnonzero(np.diff(groups, prepend=-1))  # images with which groups begin
    edges = np.append(first, len(order))[np.searchsorted(first, np.arange(0, len(order) + size, size))]
    for start, end in list(itertools.pairwise(edges.tolist()))[world.rank :: world.size]:
        if start < end:
            chosen = order[start:end]
            arrays = images.images[chosen], places[chosen], groups[start:end]
            block, of_block, own = (torch.from_numpy(array).to(world.device) for array in arrays)
            yield block, of_block, own


def sum_over_ranks(
    world: World,
    images: ImageSet,
    places: np.ndarray,
    total: Tensor,
    add: Callable[[Tensor, Tensor, Tensor, int], None],
) -> np.ndarray:
    """`total` int64, of zeros, to which `add(images, places, groups, size)` adds every block of all ranks.

    A block is that of `blocks_of_rank` of the `size`. Images of a group are in one block, and sums are of
    whole numbers: the result is the same to the bit for any number of ranks, which call this together.
    """
    size = block_size(images.images.shape, BLOCK)
    for block, of_block, groups in blocks_of_rank(world, images, places, size):
        add(block, of_block, groups, size)
    return world.all_reduce_(total).cpu().numpy()


def draw_once(
    config: Config,
    run_dir: RunDir,
    world: World,
    sensitive: Sensitive,
    mechanism: Mechanism,
    path: Path,
    exact: Callable[[str], np.ndarray],
    noisy: Callable[[np.ndarray, bytes], np.ndarray],
    inputs: Sequence[bytes] = (),
) -> Drawn:
    """The statistic in `path`, or the only one that is ever drawn: see `draw_once_by`.

    `exact(name)` is the statistic without noise, int64, equal on all ranks, from the name of its charge;
    `noisy(exact, key)` adds noise from 32 secret bytes.
    """
    account = sensitive.account

    def draw(name: str) -> np.ndarray | None:
        # Summed before it is charged: what fails until then has cost nothing.
        total = exact(name)
        account.charge_once(mechanism, name, world, run_dir.path)
        return noisy(total, noise_key(account, mechanism, name, total)) if world.is_main else None

    return draw_once_by(config, run_dir, world, sensitive, mechanism, path, draw, inputs)


def noise_key(account: Account, mechanism: Mechanism, name: str, total: np.ndarray, step: int = 0) -> bytes:
    """32 secret bytes for the noise on a sum, by the name of its charge; on the main rank.

    They depend on the sum that the noise hides: two different sums can never have the same noise.
    """
    purpose = f"{mechanism.stage} noise" + (f" {step}" if step else "")
    return account.root.derive(purpose, name, digest_of_tensors([total]).hex())


def draw_once_by(
    config: Config,
    run_dir: RunDir,
    world: World,
    sensitive: Sensitive,
    mechanism: Mechanism,
    path: Path,
    draw: Callable[[str], np.ndarray | None],
    inputs: Sequence[bytes] = (),
) -> Drawn:
    """What `draw(name)` charges under this name and returns on the main rank, or what is in `path` from
    before; all ranks call it together.

    The folder of `path` is the stage's; `inputs` are digests of what sees the images, as a network. Raises
    UserError if it was drawn before and is lost or damaged.
    """
    account = sensitive.account
    if not told.exists(path, world):
        # The charge is named by public inputs and the set as a whole.
        stage = path.parent.name
        own = {"plan": account.plan.to_dict(), "rows": sensitive.rows, "mechanism": mechanism.stage}
        identity = computation(world, account.root, sensitive.images.content, config, stage, own, inputs)
        name = charge_name(account.root, identity).hex()
        values = draw(name)
        if values is not None:
            write_arrays(path, {"values": values, "charge": np.array(name)})
        world.barrier()
    return kept(path, world)


def kept(path: Path, world: World) -> Drawn:
    """What was drawn into `path`, on all ranks. Raises UserError if it is lost or damaged."""
    try:
        file = told.arrays(path, world)
        return Drawn(file["values"], str(file["charge"]))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        raise UserError(f"{path}: damaged, and charged already; choose another run.dir") from None
