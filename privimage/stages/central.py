"""Central images of the sensitive set: noisy means of its classes over random parts of it."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from privimage.config import Config
from privimage.distributed.world import World
from privimage.models.edm import to_uint8
from privimage.privacy.mechanisms import CentralImages
from privimage.privacy.mechanisms.central import central_sum, noisy_central_means, random_parts
from privimage.privacy.noise import bit_generator
from privimage.stages.noisy_statistic import Drawn, Sensitive, draw_once, sum_over_ranks
from privimage.storage.rundir import RunDir


def central_means(
    config: Config, run_dir: RunDir, world: World, sensitive: Sensitive, mechanism: CentralImages, path: Path
) -> Drawn:
    """Noisy means float64 (parts * rows, values), rows last; kept in `path`: see `draw_once`."""
    source, rows = config.privacy.noise_source, sensitive.rows

    def exact(name: str) -> np.ndarray:
        key = sensitive.account.root.derive("central parts", name)
        # All images of a group are in the part that was drawn for it.
        images = sensitive.images
        bits = bit_generator(source, key).random_raw(int(images.groups.max()) + 1)
        places = random_parts(bits, mechanism.parts)[images.groups] * rows + images.labels
        count = mechanism.parts * rows
        total = torch.zeros(count, mechanism.values, dtype=torch.int64, device=world.device)

        def add(block: Tensor, of_block: Tensor, groups: Tensor, _: int) -> None:
            total.add_(central_sum(block, of_block, groups, count, mechanism))

        return sum_over_ranks(world, images, places, total, add)

    def noisy(total: np.ndarray, key: bytes) -> np.ndarray:
        return noisy_central_means(total, mechanism, source, key)

    return draw_once(config, run_dir, world, sensitive, mechanism, path, exact, noisy)


def enlarged(means: np.ndarray, shape: tuple[int, int, int]) -> Tensor:
    """Images uint8 (n, C, H, W) of `shape` (C, H, W) from noisy means float64 (n, values) of small ones."""
    channels, side = shape[0], math.isqrt(means.shape[1] // shape[0])
    small = torch.from_numpy(means).float().view(-1, channels, side, side).clamp(-1, 1)
    return to_uint8(F.interpolate(small, size=shape[1:], mode="bilinear", align_corners=False))


def moved(images: Tensor, normal: Tensor) -> Tensor:
    """Images uint8 (B, C, H, W), each turned, scaled and shifted by its own normal numbers (B, 4)."""
    # Radians, logarithm of the scale, and shifts of a whole image of width 2: small, as between photographs.
    angle, scale = normal[:, 0] * 0.15, (normal[:, 1] * 0.08).exp()
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack(
        [torch.stack([cos, -sin, normal[:, 2] * 0.1], 1), torch.stack([sin, cos, normal[:, 3] * 0.1], 1)], 1
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    turned = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return turned.round().clamp(0, 255).to(torch.uint8)
