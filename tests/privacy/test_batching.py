"""How many images go through the network at once."""

import pytest
import torch
from torch import nn

from privimage.config.settings import Finetune
from privimage.errors import UserError
from privimage.privacy.batching import physical_batch_size
from privimage.telemetry import memory


def ones(module: object, images: torch.Tensor) -> torch.Tensor:
    return images.sum(1)


def probe(count: int) -> tuple[torch.Tensor]:
    return (torch.ones(count, 1, 1),)


def size(device: str, ranks: int, **settings) -> int:
    return physical_batch_size(Finetune(**settings), nn.Identity(), ones, probe, torch.device(device), ranks)


@pytest.mark.parametrize(
    ("logical", "ranks", "expected"),
    [(16_384, 1, 128), (862, 2, 128), (240, 1, 96), (20, 1, 48), (4, 1, 16), (64, 32, 16)],
)
def test_on_a_cpu_it_is_small_and_a_multiple_of_16(logical: int, ranks: int, expected: int) -> None:
    """With 20 images expected, one batch of 48 is enough 999 times in 1,000."""
    assert size("cpu", ranks, logical_batch_size=logical, physical_batch_size="auto") == expected


@pytest.mark.parametrize(
    ("logical", "given", "expected"),
    [(862, 64, 64), (16_384, 100, 112), (64, 16, 16), (512, 128, 128), (30, 64, 48), (5, 1, 1)],
)
def test_on_a_cpu_it_is_at_most_the_next_multiple_of_what_was_asked_for(
    logical: int, given: int, expected: int
) -> None:
    assert size("cpu", 1, logical_batch_size=logical, physical_batch_size=given) == expected


@pytest.mark.parametrize(
    ("numbers", "ranks", "expected"),
    [
        (100_000, 1, 128),
        (1_750_000, 1, 48),
        (8_000_000, 1, 32),
        (80_000_000, 1, 16),
        (300_000_000, 1, 1),
        (80_000_000, 3, 1),
    ],
)
def test_on_a_cpu_the_gradients_of_large_networks_have_room(
    monkeypatch: pytest.MonkeyPatch, numbers: int, ranks: int, expected: int
) -> None:
    """In 24 GiB; at worst image by image."""
    monkeypatch.setattr(memory, "total", lambda: 24 << 30)
    module = nn.Linear(numbers // 1000, 1000, bias=False, device="meta")
    found = physical_batch_size(
        Finetune(logical_batch_size=16_384), module, ones, probe, torch.device("cpu"), ranks
    )
    assert found == expected


def test_a_network_of_which_not_one_gradient_fits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total", lambda: 24 << 30)
    module = nn.Linear(300_000, 1000, bias=False, device="meta")
    with pytest.raises(UserError, match=r"a gradient of 300,000,000 numbers .* no room for 8 ranks"):
        physical_batch_size(Finetune(logical_batch_size=16_384), module, ones, probe, torch.device("cpu"), 8)


@pytest.mark.parametrize(("ranks", "batches"), [(1, 17), (4, 5), (16, 2), (64, 1)])
def test_on_a_gpu_the_batches_of_a_share_are_even(ranks: int, batches: int) -> None:
    """They are filled up there.

    With 64 ranks of 256 images each, a batch of 1024 would be three quarters in vain.
    """
    found = size("cuda", ranks, logical_batch_size=16_384, physical_batch_size=1024)
    share = 16_384 / ranks
    assert found <= 1024
    assert (
        share + 3 * share**0.5 <= batches * found < (share + 3 * share**0.5) + batches
    )  # a thousandth of samples takes one more
