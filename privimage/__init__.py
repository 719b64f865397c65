"""PrivImage: differentially private image synthesis, from a laptop to a cluster."""

import torch
from torch import library

__version__ = "0.1.0"

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # PyPI's torchvision links CUDA: beside a CPU build of torch these two must be declared before its first
    # import.
    for _operator in ("nms", "qnms"):
        library.define(
            f"torchvision::{_operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
