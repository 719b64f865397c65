"""The averaged weights against their closed form."""

import pytest
import torch
from torch import nn

from privimage.models.ema import EMA


def weights(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(2, 1).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)
    return module


def test_the_ramp_is_min_of_decay_and_1_plus_n_over_10_plus_n() -> None:
    module = weights(0.0)
    ema = EMA(module, 0.5)
    values = torch.arange(1.0, 31.0)
    for value in values:
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update()
    # The share of the n-th weights is (1 - d_n) times the product of the decays after it; the ramp reaches
    # 0.5 at n = 8.
    decays = torch.tensor([min(0.5, (1 + n) / (10 + n)) for n in range(1, 31)], dtype=torch.float64)
    shares = (1 - decays) * torch.tensor([decays[n + 1 :].prod() for n in range(30)])
    assert decays[6] < 0.5 == decays[7]
    assert ema.averages["weight"][0, 0].item() == pytest.approx((shares * values).sum().item(), rel=1e-5)


def test_the_first_update_forgets_nine_elevenths_of_the_start() -> None:
    module = weights(0.0)
    ema = EMA(module, 0.999)
    with torch.no_grad():
        module.weight.fill_(11.0)
    ema.update()
    assert ema.averages["weight"][0, 0].item() == pytest.approx(9.0)


def test_averages_of_a_bf16_module_are_fp32() -> None:
    module = weights(1.0, torch.bfloat16)
    ema = EMA(module, 0.9999)
    for _ in range(2000):
        ema.update()
    with torch.no_grad():
        module.weight.fill_(1.0078125)
    ema.update()
    assert ema.averages["weight"].dtype == torch.float32
    assert 1 < ema.averages["weight"][0, 0] < 1.0078125


def test_the_module_itself_is_left_alone_and_copy_to_fills_another() -> None:
    module, other = weights(2.0), weights(0.0)
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(13.0)
    ema.update()
    ema.copy_to(other)
    assert module.weight[0, 0] == 13
    assert other.weight[0, 0].item() == pytest.approx(11.0)
    assert other.bias[0] == 2
    assert other.weight.requires_grad


def test_a_restored_average_goes_on_exactly(tmp_path) -> None:
    module = weights(1.0)
    ema, path = EMA(module, 0.999), tmp_path / "ema.pt"
    ema.update()
    torch.save(ema.state_dict(), path)
    restored = EMA(weights(5.0), 0.999)
    restored.load_state_dict(torch.load(path, weights_only=True))
    for one in (ema, restored):
        with torch.no_grad():
            one.module.weight.fill_(3.0)
        one.update()
    assert restored.updates == 2
    assert torch.equal(ema.averages["weight"], restored.averages["weight"])


def test_the_state_of_another_network_is_refused() -> None:
    with pytest.raises(KeyError, match="weight"):
        EMA(weights(1.0), 0.9).load_state_dict({"updates": 1, "averages": {"other": torch.zeros(1)}})
