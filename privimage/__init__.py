"""PrivImage: differentially private image synthesis, from a laptop to a cluster."""

import torch

__version__ = "0.1.0"

if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
    # PyPI's torchvision links CUDA: beside a CPU build of torch these two must be declared before its first import.
    # The library object is kept: the declarations go with it.
    _torchvision = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _torchvision.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
