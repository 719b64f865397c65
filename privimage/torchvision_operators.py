"""What PyPI's torchvision needs beside a CPU build of torch."""

import torch
from torch import library


def declare() -> None:
    """Make the first import of torchvision succeed; called before it, and before packages that import it.

    PyPI's torchvision links CUDA. Beside a CPU build of torch its compiled operators cannot be loaded, and
    its import fails with "operator torchvision::nms does not exist" unless the two for which it registers a
    fake implementation are declared. Nothing here calls them.
    """
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        for operator in ("nms", "qnms"):
            library.define(
                f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
