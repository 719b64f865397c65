"""The short measurement behind `privimage plan`."""

import pytest
import torch
from torch import Tensor

from privimage.families import work

CPU = torch.device("cpu")


class Pass:
    """A layer of 3 weights, and how it was called."""

    def __init__(self) -> None:
        self.weight = torch.ones(3, 5, requires_grad=True)
        self.sizes: list[int] = []
        self.dtypes: set[torch.dtype] = set()

    def __call__(self, images: int) -> Tensor:
        self.sizes.append(images)
        out = torch.ones(images, 3) @ self.weight
        self.dtypes.add(out.dtype)
        return out.square()


def test_a_fast_pass_is_measured_with_the_images_that_it_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "_seconds", lambda forward, images: 1e-3 * len(forward(images)) ** 0.5)
    forward = Pass()
    seconds, memory = work.measured(forward, CPU, "fp32", 50)
    assert sorted(set(forward.sizes)) == [8, 16, 32, 50]
    assert seconds == pytest.approx(1e-3 * 50**-0.5)  # of the last size: overhead is shared by 50 images
    assert memory == 4 * 3 + 4 * 5  # what the product and the square keep of an image
    assert forward.dtypes == {torch.float32}


def test_a_slow_pass_is_measured_with_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "ENOUGH", 0.0)
    forward = Pass()
    work.measured(forward, CPU, "bf16", 50)
    assert set(forward.sizes) == {8} and forward.dtypes == {torch.bfloat16}


def test_no_more_images_than_the_stage_has() -> None:
    forward = Pass()
    work.measured(forward, CPU, "fp32", 3)
    assert set(forward.sizes) == {3}
