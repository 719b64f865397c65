"""Batch norm over the images of all ranks, also on CPUs (torch's SyncBatchNorm needs GPUs)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from privimage.distributed.world import World


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, g):
        # Every rank's loss depends on every rank's summand.
        total = g.contiguous().clone()
        dist.all_reduce(total)
        return total


class RanksBatchNorm2d(nn.BatchNorm2d):
    """In training, batch norm whose mean and variance are those of all ranks' images, equally many on each.

    In eval mode it is an ordinary batch norm.
    """

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), float32 in training."""
        if not self.training:
            return super().forward(images)
        assert (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
            and self.momentum is not None
        )
        # Statistics in float32, also where the network runs in bf16.
        images = images.float()
        mean = self._mean(images)
        centred = images - mean[:, None, None]
        # Two passes, so that the variance does not cancel.
        variance = self._mean(centred.square())
        with torch.no_grad():
            count = images[:, 0].numel() * dist.get_world_size()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
        out = centred * (variance + self.eps).rsqrt()[:, None, None]
        return out * self.weight[:, None, None] + self.bias[:, None, None] if self.affine else out

    @staticmethod
    def _mean(images: Tensor) -> Tensor:
        return _SumOverRanks.apply(images.mean((0, 2, 3))) / dist.get_world_size()


def over_ranks(module: nn.Module, world: World) -> None:
    """Let each fresh batch norm in `module` see the images of all ranks; names in its state stay."""
    if world.size == 1:
        return
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                wide = RanksBatchNorm2d(child.num_features, child.eps, child.momentum, child.affine).to(
                    world.device
                )
                wide.load_state_dict(child.state_dict())
                setattr(parent, name, wide)
