"""How many images go through the network at once."""

import pytest
import torch
from torch import nn

from privimage.config import Finetune
from privimage.privacy.batching import physical_batch_size


def size(device: str, ranks: int, **settings) -> int:
    return physical_batch_size(Finetune(**settings), nn.Identity(), lambda *t: t[0], lambda count: (), torch.device(device), ranks)


@pytest.mark.parametrize(("logical", "expected"), [(16_384, 32), (20, 20)])
def test_on_a_cpu_it_is_small_or_what_was_asked_for(logical: int, expected: int) -> None:
    assert size("cpu", 1, logical_batch_size=logical, physical_batch_size="auto") == expected
    assert size("cpu", 1, logical_batch_size=logical, physical_batch_size=100) == 100


@pytest.mark.parametrize(("ranks", "batches"), [(1, 17), (4, 5), (16, 2), (64, 1)])
def test_on_a_gpu_the_batches_of_a_share_are_even(ranks: int, batches: int) -> None:
    """They are filled up there: with 64 ranks of 256 images each, a batch of 1024 would be three quarters in vain."""
    found = size("cuda", ranks, logical_batch_size=16_384, physical_batch_size=1024)
    share = 16_384 / ranks
    assert found <= 1024
    assert share + 3 * share**0.5 <= batches * found < (share + 3 * share**0.5) + batches  # a thousandth of samples takes one more
