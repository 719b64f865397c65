"""What privacy costs: one private step against the same step without it, in turn, in one run.

    python benchmarks/private_step.py [--device cuda --times 16] [--precision bf16] [--rounds 8]

Prints, for the 1.75M DDPM++ of CIFAR-10, medians over interleaved rounds of: the non-private step (same
images and copies), the private one (folded gradients, clip and sum), vmap(grad), and Opacus' hooks where they
apply: once in this process, which keeps freed memory as PrivImage's processes do, and on a CPU once more in a
process that leaves the C library as it is, as Opacus does; the peak memory of the first two, each in a
process of its own; and the share of clipping, summing, noise and update in a logical batch of 16,384.
"""

import argparse
import contextlib
import copy
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from privimage.models import edm, parameters
from privimage.models.ddpmpp import DDPMpp
from privimage.privacy.gradients import FoldedGradients, Losses, VmapGradients, clip_and_sum_
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.noise import gaussian
from privimage.telemetry import memory

Step = Callable[[], None]


def in_precision(device: str, precision: str) -> Losses:
    """EDM's loss under autocast, as fine-tuning has it; the backward pass follows, norms and sums do not."""

    def losses(network: Callable, *tensors: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            return edm.loss(network, *tensors)

    return losses


def batch(images: int, copies: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random images (B, K, 3, 32, 32), labels, noise levels and noise."""
    x = torch.randn(images, 1, 3, 32, 32, device=device).expand(-1, copies, -1, -1, -1)
    labels = torch.randint(0, 10, (images, 1), device=device).expand(-1, copies)
    return (
        x,
        labels,
        torch.rand(images, copies, device=device) + 0.1,
        torch.randn(images, copies, 3, 32, 32, device=device),
    )


def plain(network: nn.Module, losses: Losses, tensors: tuple[Tensor, ...]) -> Step:
    """The non-private step: one backward pass of the mean loss over all images and copies."""
    flat = [t.flatten(0, 1) for t in tensors]

    def step() -> None:
        network.zero_grad(set_to_none=True)
        losses(network, *flat).mean().backward()

    return step


def private(network: nn.Module, losses: Losses, tensors: tuple[Tensor, ...], kind: type) -> Step:
    """Per-image gradients averaged over the copies, clipped and summed."""
    gradients, total = (
        kind(network),
        torch.zeros(parameters(network), device=tensors[0].device, dtype=torch.float64),
    )
    trained = list(network.parameters())

    def step() -> None:
        gradients.backward(losses, *tensors)
        clip_and_sum_(total, trained, 1e-3)
        for p in trained:
            p.grad_sample = None

    return step


def hooks(network: nn.Module, losses: Losses, tensors: tuple[Tensor, ...]) -> Step:
    """Opacus' own step: its hooks give gradients of every image and copy, averaged over the copies.

    Its optimizer clips and sums.
    """
    images, copies = tensors[0].shape[:2]
    flat = [t.flatten(0, 1) for t in tensors]
    wrapped, trained = GradSampleModule(network, loss_reduction="sum"), list(network.parameters())
    optimizer = DPOptimizer(
        torch.optim.Adam(trained), noise_multiplier=1.0, max_grad_norm=1e-3, expected_batch_size=images
    )

    def step() -> None:
        wrapped.zero_grad(set_to_none=True)
        losses(wrapped, *flat).sum().backward()
        for p in trained:
            p.grad_sample = p.grad_sample.view(images, copies, *p.shape).mean(1)
        optimizer.clip_and_accumulate()
        optimizer.zero_grad(set_to_none=True)

    return step


@contextlib.contextmanager
def hooks_alone(*how: int | str) -> Iterator[Step]:
    """The same step of a process of its own, whose freed memory goes back to the system.

    `how` is as in `_hooks_on_demand`.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_hooks_on_demand, args=(there, *how), daemon=True)
    process.start()
    there.close()

    def step() -> None:
        here.send(True)
        here.recv()

    yield step
    here.send(False)
    process.join()


def _hooks_on_demand(
    asked: Connection, images: int, copies: int, device: str, precision: str, threads: int
) -> None:
    torch.set_num_threads(threads)
    step = hooks(
        edm.Denoiser(DDPMpp(32, 3, 10)).to(device),
        in_precision(device, precision),
        batch(images, copies, device),
    )
    while asked.recv():
        step()
        _wait(device)
        asked.send(None)


def interleaved(steps: dict[str, Step], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each step, the steps taken in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16"),
        help="of forward and backward, of all steps alike",
    )
    parser.add_argument(
        "--times", type=int, default=1, help="so many times the images, for a device that these do not fill"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory.keep_freed()
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, for all steps alike
    device, precision = arguments.device, arguments.precision
    losses = in_precision(device, precision)
    torch.manual_seed(0)
    fresh = edm.Denoiser(DDPMpp(32, 3, 10)).to(device)
    print(
        f"{parameters(fresh):,} parameters, {device}, {precision}, {arguments.threads} threads, medians of "
        f"{arguments.rounds} interleaved rounds"
    )
    few, per_image = 8 * arguments.times, 0.0
    for images, copies, with_hooks in ((few, 8, False), (few, 4, True), (4 * few, 1, True)):
        tensors = batch(images, copies, device)
        steps = {
            "non-private": plain(copy.deepcopy(fresh), losses, tensors),
            "private": private(copy.deepcopy(fresh), losses, tensors, FoldedGradients),
            "vmap": private(copy.deepcopy(fresh), losses, tensors, VmapGradients),
        }
        with contextlib.ExitStack() as stack:
            if with_hooks:
                steps["Opacus hooks"] = hooks(copy.deepcopy(fresh), losses, tensors)
                if device == "cpu":
                    steps["Opacus hooks, memory not kept"] = stack.enter_context(
                        hooks_alone(images, copies, device, precision, arguments.threads)
                    )
            found = interleaved(steps, arguments.rounds, device)
        print(f"{images} images x {copies} copies: non-private {found['non-private']:.4f} s = 1")
        for name, value in found.items():
            print(
                f"    {name}: {value / found['non-private']:.2f}, {value / found['private']:.2f} of private",
                flush=True,
            )
        if copies == 8:
            per_image = found["private"] / images
    _peaks(few, device, precision, arguments.threads)
    _share(fresh, few, per_image, device)


def _peaks(images: int, device: str, precision: str, threads: int) -> None:
    """The peak memory of a private and a non-private step of some images and 8 copies, above that of a
    process that did nothing yet.
    """
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        peaks = {
            kind: pool.apply(_peak, (kind, images, device, precision, threads))
            for kind in ("non-private", "private")
        }
    told = ", ".join(f"{kind} {peak / 2**20:.0f} MiB" for kind, peak in peaks.items())
    print(
        (
            f"peak memory of {images} images x 8 copies: {told}, ratio "
            f"{peaks['private'] / peaks['non-private']:.2f}"
        ),
        flush=True,
    )


def _peak(kind: str, images: int, device: str, precision: str, threads: int) -> int:
    torch.set_num_threads(threads)
    memory.keep_freed()
    before = 0 if device == "cuda" else memory.resident()
    network = edm.Denoiser(DDPMpp(32, 3, 10)).to(device)
    losses, tensors = in_precision(device, precision), batch(images, 8, device)
    step = (
        private(network, losses, tensors, FoldedGradients)
        if kind == "private"
        else plain(network, losses, tensors)
    )
    for _ in range(3):
        step()
    return memory.peak(torch.device(device)) - before


def _share(network: nn.Module, images: int, per_image: float, device: str) -> None:
    """The time of clipping, sum, noise and update beside a logical batch of 16,384 images, 8 copies each."""
    size, trained = parameters(network), list(network.parameters())
    total = torch.zeros(size, device=device, dtype=torch.float64)
    samples = [torch.randn(images, *p.shape, device=device) for p in trained]
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer, root = torch.optim.Adam(trained, lr=3e-4), insecure_fixed(0)

    def clip() -> None:
        for p, sample in zip(trained, samples, strict=True):
            p.grad_sample = sample  # type: ignore[attr-defined]
        clip_and_sum_(total, trained, 1e-3)

    def release() -> None:
        total.add_(
            torch.from_numpy(gaussian("aes-ctr", root.derive("benchmark", 0), size, 1e-3)).to(device)
        ).float()
        optimizer.step()

    found = interleaved({"clip": clip, "release": release}, 8, device)
    clipping, whole = found["clip"] * 16384 / images, 16384 * per_image
    told = f"clipping and sum {clipping:.2f} s, noise and update {found['release']:.2f} s"
    print(
        f"of a logical step of {whole:.1f} s: {told}: together "
        f"{100 * (clipping + found['release']) / whole:.2f} %"
    )


if __name__ == "__main__":
    main()
