"""The update of DP-SGD over all ranks.

With W ranks, rank r adds noise of standard deviation sigma C / sqrt(W) from its own stream to the sum of its
clipped per-image gradients. One flat all-reduce adds up the sums: the sum over the whole logical batch plus
noise of standard deviation sigma C, for any W.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from privimage.distributed.agreement import Ranks
from privimage.privacy.gradients import clip_and_sum_
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.noise import NoiseStream


@dataclass
class StepStatistics:
    """Counts of a private step over all ranks. All but `stop` are private."""

    stop: bool
    images: int
    non_finite: int
    clipped: int
    loss_sum: float
    norm_sum: float


class PrivateOptimizer(DPOptimizer):
    """Opacus' optimizer with the clipping, noise and synchronisation of this project.

    Works under BatchMemoryManager. `step` returns true when a logical batch was completed; `statistics` then
    holds its counts. The caller has charged the step and prepared its noise (`privacy.dpsgd.PrivateSteps`).
    """

    STATISTICS = 6

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plan: DPSGD,
        world: Ranks,
        noise: NoiseStream | None,
        stop_requested: Callable[[], bool],
    ):
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.logical_batch_size,
        )
        self.world, self.noise, self.stop_requested = world, noise, stop_requested
        self.size = sum(p.numel() for p in self.params)
        self.gradient_sum = torch.zeros(self.size, device=world.device, dtype=torch.float64)
        # What the ranks exchange: the noised sum, and behind it the statistics, which are outside the noised
        # part.
        self.flat = torch.zeros(self.size + self.STATISTICS, device=world.device)
        self.statistics: StepStatistics | None = None

    def count_losses(self, losses: Tensor) -> None:
        """Add the losses (B,) of a physical batch to the private statistics."""
        self.flat[self.size + 4] += losses.nan_to_num(0.0, 0.0, 0.0).sum()

    def clip_and_accumulate(self) -> None:
        """Clip the per-image gradients of a physical batch and add them to the sum.

        A rank without images adds nothing.
        """
        # A rank whose share of the sample is empty still takes part in the collective.
        if self.params[0].grad_sample is None:
            return
        # Everything below is counted without noise, and stays in private/.
        norms, finite = clip_and_sum_(self.gradient_sum, self.params, self.max_grad_norm)
        statistics = self.flat[self.size :]
        statistics[1] += len(norms)
        statistics[2] += (~finite).sum()
        statistics[3] += (norms[finite] > self.max_grad_norm).sum()
        statistics[5] += norms[finite].sum()
        for p in self.params:
            p.grad_sample = None

    def add_noise(self) -> None:
        """Add this rank's noise to its sum, and all ranks' noised sums together."""
        if self.noise is not None:
            self.gradient_sum += self.noise.take().to(self.gradient_sum.device)
        # Noise was added in float64, before the sum is rounded to float32: rounding first would reveal low
        # bits.
        self.flat[: self.size] = self.gradient_sum
        self.flat[self.size] = float(self.stop_requested())
        self.world.all_reduce_(self.flat)

    def scale_grad(self) -> None:
        """Divide by the expected batch size q N, never by the realised one."""
        # The expected batch size is public; the realised one is not.
        start = 0
        for p in self.params:
            p.grad = (self.flat[start : start + p.numel()] / self.expected_batch_size).view_as(p)
            start += p.numel()
        stop, images, non_finite, clipped, loss_sum, norm_sum = self.flat[self.size :].tolist()
        self.statistics = StepStatistics(
            stop > 0, int(images), int(non_finite), int(clipped), loss_sum, norm_sum
        )
        self.flat.zero_()
        self.gradient_sum.zero_()

    def pre_step(self, closure=None) -> bool:
        """Everything before the update; false while the logical batch goes on."""
        self.clip_and_accumulate()
        # More physical batches of this logical batch follow.
        if self._check_skip_next_step():
            return False
        self.add_noise()
        self.scale_grad()
        return True

    def step(self, closure=None) -> bool:
        """Take in a physical batch; update when it completes the logical one, and return whether it did."""
        if not self.pre_step():
            return False
        self.original_optimizer.step()
        return True
