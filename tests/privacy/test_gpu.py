"""What must hold on a GPU as on a CPU.

Exact per-image gradients, the bound on one image's share, the ledger after a kill.
"""

import copy
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from ranks import TINY, charges, clean_environment
from torch import Tensor, nn

from privimage.config.settings import Finetune
from privimage.models import edm, parameters
from privimage.models.biggan import Discriminator
from privimage.models.ddpmpp import DDPMpp
from privimage.privacy.batching import physical_batch_size
from privimage.privacy.convolutions import WAYS
from privimage.privacy.gradients import (
    FoldedGradients,
    RecordedGradients,
    VmapGradients,
    clip_and_sum_,
)
from privimage.privacy.ledger import read
from privimage.storage.files import read_json

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def noised(images: int, copies: int) -> tuple[Tensor, ...]:
    """What EDM's loss takes, for `denoiser`."""
    x = torch.randn(images, 1, 3, 16, 16).expand(-1, copies, -1, -1, -1)
    labels = torch.randint(0, 3, (images, 1)).expand(-1, copies)
    return tuple(
        t.to(DEVICE)
        for t in (x, labels, torch.rand(images, copies) + 0.1, torch.randn(images, copies, 3, 16, 16))
    )


def trained(network: nn.Module) -> nn.Module:
    """Weights that are not those of the beginning, where many gradients are zero."""
    for p in network.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return network.to(DEVICE)


def denoiser() -> nn.Module:
    return trained(edm.Denoiser(DDPMpp(16, 3, 3, width=32, multipliers=(1, 2), attention=(8,))))


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.grad_sample.double().flatten(1) for p in module.parameters()], dim=1)


@pytest.mark.parametrize("way", [*sorted(WAYS), None])
@pytest.mark.parametrize("kind", ["diffusion", "gan"])
def test_per_image_gradients_are_those_of_the_oracle(kind: str, way: str | None) -> None:
    torch.manual_seed(0)
    if kind == "diffusion":
        network, losses, tensors = denoiser(), edm.loss, noised(6, 3)
    else:
        network = trained(Discriminator(16, 3, 3, width=16))
        tensors = (torch.randn(6, 3, 3, 16, 16, device=DEVICE), torch.randint(0, 3, (6, 3), device=DEVICE))

        def losses(d: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return d(x, y).flatten().exp()

    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    folded, oracle = copy.deepcopy(network), copy.deepcopy(network)
    FoldedGradients(folded, dict.fromkeys(names, way) if way else None).backward(losses, *tensors)
    VmapGradients(oracle).backward(losses, *tensors)
    right = flat(oracle)
    assert ((flat(folded) - right).norm(dim=1) < 1e-4 * right.norm(dim=1)).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_of_an_image_is_the_same_to_the_bit_whatever_the_others(precision: str) -> None:
    """Their number, their values (one is not finite) and their places.

    What cuDNN would do by itself differs by 1e-4.
    """
    torch.manual_seed(0)
    network, tensors, others = denoiser(), noised(8, 2), [t.clone() for t in noised(8, 2)]
    others[0][5] = float("nan")

    def losses(m: nn.Module, *t: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            return edm.loss(m, *t)

    gradients = FoldedGradients(network, filled_to=8)
    gradients.backward(losses, *tensors)
    first = flat(network)[:3]
    gradients.backward(losses, *(torch.cat([b[3:], a[:3]]) for a, b in zip(tensors, others, strict=True)))
    found = flat(network)
    assert torch.equal(found[5:], first)
    assert not found[2].isfinite().all() and found[[0, 1, 3, 4]].isfinite().all()
    gradients.backward(losses, *(t[:3] for t in tensors))
    assert torch.equal(flat(network), first)


def test_recorded_gradients_are_those_of_the_kernels_one_by_one() -> None:
    """To the bit, for another batch than the one that was recorded, a short one, and after a step."""
    torch.manual_seed(0)
    network, batches = denoiser(), [noised(8, 2), noised(8, 2), noised(5, 2)]
    other = copy.deepcopy(network)
    folded, recorded = FoldedGradients(network, filled_to=8), RecordedGradients(other, filled_to=8)
    for tensors in batches:
        losses = folded.backward(edm.loss, *tensors)
        assert torch.equal(recorded.backward(edm.loss, *tensors), losses)
        assert torch.equal(flat(other), flat(network))
        with torch.no_grad():
            for own, twin in zip(network.parameters(), other.parameters(), strict=True):
                step = 0.01 * torch.randn_like(own)
                own.add_(step)
                twin.add_(step)
        folded.clear()
        recorded.clear()
    assert len(recorded.recordings) == 1


def test_norms_of_millions_of_weights_and_hostile_images() -> None:
    torch.manual_seed(0)
    layer = nn.Parameter(torch.zeros(384, 768, 3, 3, device=DEVICE))
    layer.grad_sample = torch.randn(4, *layer.shape, device=DEVICE)
    layer.grad_sample[1], layer.grad_sample[2, 0, 0, 0, 0] = 1e30, float("nan")
    total = torch.zeros(layer.numel(), dtype=torch.float64, device=DEVICE)
    norms, finite = clip_and_sum_(total, [layer], 1.0)
    right = layer.grad_sample[[0, 3]].flatten(1).double()
    assert finite.tolist() == [True, False, False, True]
    assert torch.allclose(norms[[0, 3]].double(), right.norm(dim=1), rtol=1e-6)
    assert (total - (right / right.norm(dim=1, keepdim=True)).sum(0)).norm() < 3e-5 * total.norm()


def test_an_automatic_physical_batch_fits_and_fills() -> None:
    network, settings = denoiser(), Finetune(logical_batch_size=10**6, noise_copies=2)
    images = physical_batch_size(settings, network, edm.loss, lambda count: noised(count, 2), DEVICE, 1)
    assert images > 64
    FoldedGradients(network).backward(edm.loss, *noised(images, 2))
    clip_and_sum_(
        torch.zeros(parameters(network), dtype=torch.float64, device=DEVICE), list(network.parameters()), 1.0
    )


def test_a_killed_run_goes_on_with_fresh_noise_and_a_full_ledger(tmp_path: Path) -> None:
    """Sums on a GPU need not repeat to the bit, so what was lost is paid for.

    Fewer steps, never more charges than planned.
    """
    folder, spent = tmp_path / "run", 0
    settings = (
        "runtime.device=cuda",
        "finetune.physical_batch_size=auto",
        "finetune.steps=60",
        "finetune.checkpoint_every=7",
    )
    command, account = (
        ["privimage", "run", str(TINY), f"run.dir={folder}", *settings],
        folder / "private" / "account.json",
    )
    with subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        while spent < 10:
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.01)
            begun = account.exists() and Path(read_json(account)["ledger"]).exists()
            spent = sum(m.count for m in charges(folder)) if begun else 0
        os.kill(running.pid, signal.SIGKILL)
    ended = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    done = read_json(folder / "finetune" / "done.json")
    assert done["attempts"] == 2 and done["steps"] < 60
    assert sum(m.count for m in charges(folder)) == 61 and not read(Path(read_json(account)["ledger"])).torn
    assert (folder / "release" / "synthetic.npz").exists()
