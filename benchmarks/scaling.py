"""Strong scaling of pretraining and private fine-tuning from one rank to more, and what 64 or 512 GPUs would
take.

    python benchmarks/scaling.py [--device cuda] [--ranks 2 4] [--rounds 5]

The same global batch on 1 rank and on each of `--ranks`, one thread each on a CPU, in turn in one run;
medians. Beside them the machine's own limit: as many processes that share the work and nothing else, since
cores share memory. Also counts the all-reduces of a logical step and their bytes, and models the time of a
private step on clusters: computing as stated, with batches filled up; noise, names of steps, samples and the
ledger as measured here; a network as its makers state it.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist

from privimage.config import parse
from privimage.config.settings import Runtime
from privimage.data.sensitive import SensitiveSet
from privimage.distributed.engine import make_engine
from privimage.distributed.launch import free_port
from privimage.distributed.world import World, connect
from privimage.models import edm
from privimage.models.ddpmpp import DDPMpp
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.batching import GPU_COPIES
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import FoldedGradients
from privimage.privacy.identity import digest_of_tensors
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.ledger import Ledger
from privimage.privacy.mechanisms import DPSGD
from privimage.privacy.noise import gaussian
from privimage.privacy.sampling import poisson_sample

BATCH, COPIES, PHYSICAL, COUNT = (
    128,
    2,
    16,
    1280,
)  # images of a step over all ranks, noise copies, images at once, images of the set

# A node of 8 GPUs on NVLink, nodes on one 400 Gb/s InfiniBand port a GPU: what their makers state, halved.
NODE_BANDWIDTH, NETWORK_BANDWIDTH, HOP_SECONDS, NODE_GPUS = 225e9, 25e9, 10e-6, 8
# The private step that is modelled: images, copies, seconds of an image and copy on one GPU, numbers of a
# gradient; the CPU cores of each GPU, which draw its noise; steps between two writes of the ledger.
IMAGES, MODEL_COPIES, IMAGE_SECONDS, NUMBERS, CORES, SETTLED = 16_384, 8, 100e-6, 1_754_499, 8, 10


def pretraining(world: World, batch: int):
    """A function that takes one step on this rank's share and returns the number of images of all ranks."""
    config = parse(
        {
            "run": {"dir": "none"},
            "data": {"resolution": 32, "public": {"kind": "glyphs"}, "sensitive": {"kind": "digits"}},
            "pretrain": {"learning_rate": 5e-4},
        }
    )
    torch.manual_seed(0)
    engine = make_engine(config, edm.Denoiser(DDPMpp(32, 3, 10)).to(world.device), world)
    own = batch // world.size
    images, labels = (
        torch.randn(own, 3, 32, 32, device=world.device),
        torch.randint(0, 10, (own,), device=world.device),
    )
    sigma, noise = (
        torch.rand(own, device=world.device) + 0.1,
        torch.randn(own, 3, 32, 32, device=world.device),
    )

    def step() -> None:
        engine.update(lambda _: edm.loss(engine.forward, images, labels, sigma, noise).mean())

    return step


def finetuning(world: World, batch: int):
    """A function that takes one private step.

    Poisson sample, per-image gradients, clip, noise, one all-reduce, update.
    """
    torch.manual_seed(0)
    network = edm.Denoiser(DDPMpp(32, 3, 10)).to(world.device)
    count = COUNT * batch // BATCH
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8).numpy()
    data = SensitiveSet(images, torch.arange(count).numpy() % 10, world.device, "device")
    steps = PrivateSteps(
        DPSGD(
            count=count,
            logical_batch_size=batch,
            steps=1000,
            noise_multiplier=2.0,
            max_grad_norm=1e-3,
            noise_copies=COPIES,
        ),
        FoldedGradients(network, filled_to=PHYSICAL),
        NoisedCopies(),
        torch.optim.Adam(network.parameters()),
        data,
        world,
        Randomness(insecure_fixed(1), "aes-ctr", b"benchmark"),
        physical=PHYSICAL,
        charge=lambda name: True,
        state=lambda: network.state_dict().values(),
    )
    made = iter(steps)
    return lambda: next(made)


class NoisedCopies:
    """EDM's loss of copies with noise that costs next to nothing to draw."""

    def draw(
        self, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, seed: int
    ) -> tuple[torch.Tensor, ...]:
        """Images (B, C, H, W) -> images, labels, noise levels and noise, (B, K, ...) each."""
        shape = (len(images), COPIES)
        sigma, noise = (
            torch.rand(shape, device=images.device) + 0.1,
            torch.randn(*shape, 3, 32, 32, device=images.device),
        )
        return (
            edm.to_unit(images)[:, None].expand(-1, COPIES, -1, -1, -1),
            labels[:, None].expand(shape),
            sigma,
            noise,
        )

    def __call__(self, module, *tensors: torch.Tensor) -> torch.Tensor:
        """Losses (n,)."""
        return edm.loss(module, *tensors)


def serve(work: str) -> None:
    """One rank: take a step whenever the parent writes a line.

    Print its seconds, and the bytes that it all-reduced.
    """
    world = connect(Runtime(device=os.environ["DEVICE"], threads=1))
    step = {"pretrain": pretraining, "finetune": finetuning}[work](world, int(os.environ["BATCH"]))
    sent = [0, 0]
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *arguments, **named):
        sent[0], sent[1] = sent[0] + 1, sent[1] + tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *arguments, **named)

    dist.all_reduce = counted
    for _ in sys.stdin:
        world.barrier()
        sent[:] = 0, 0
        start = time.perf_counter()
        step()
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        print(time.perf_counter() - start, *sent, flush=True)


class Ranks:
    """`size` ranks that share the batch and wait for their turn.

    Strangers share it without knowing of each other.
    """

    def __init__(self, work: str, size: int, device: str, strangers: bool = False):
        port = free_port()
        self.processes = []
        for rank in range(size):
            own, ranks = (0, 1) if strangers else (rank, size)
            place = {
                "RANK": own,
                "LOCAL_RANK": own,
                "WORLD_SIZE": ranks,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port + rank - own,
            }
            place |= {"OMP_NUM_THREADS": 1, "DEVICE": device, "BATCH": BATCH * ranks // size}
            if strangers:
                place["CUDA_VISIBLE_DEVICES"] = rank
            env = os.environ | {key: str(value) for key, value in place.items()}
            command = [sys.executable, __file__, "--serve", work]
            self.processes.append(
                subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )

    def step(self) -> tuple[float, int, int]:
        """Seconds of the slowest rank, all-reduces and bytes of one."""
        for process in self.processes:
            process.stdin.write("step\n")
            process.stdin.flush()
        answers = [process.stdout.readline().split() for process in self.processes]
        return max(float(answer[0]) for answer in answers), int(answers[0][1]), int(answers[0][2])

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Overheads:
    """Seconds of one core for what a step needs beside its gradients; of the ledger, for one write."""

    noise: float  # of a whole gradient
    name: float  # the digest of the weights
    sample: float  # of 50,000 images
    ledger: float


def overheads() -> Overheads:
    """Measured here; medians of five."""
    weights, numbers = [torch.randn(NUMBERS)], iter(range(1000))
    with tempfile.TemporaryDirectory() as folder:
        ledger = Ledger(Path(folder), "f" * 64)
        return Overheads(
            _seconds(lambda: gaussian("aes-ctr", bytes(32), NUMBERS, 1.0)),
            _seconds(lambda: digest_of_tensors(weights)),
            _seconds(lambda: poisson_sample("aes-ctr", bytes(32), 50_000, Fraction(1, 3))),
            _seconds(
                lambda: ledger.charge("run", "part", SampledGaussian(1.0), str(next(numbers)), 1000),
                time.perf_counter,
            ),
        )


def _seconds(function: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    # Of the processor, so that other work on the machine does not count.
    taken = []
    for _ in range(5):
        start = clock()
        function()
        taken.append(clock() - start)
    return statistics.median(taken)


def all_reduce(size: int, gradient_bytes: int) -> float:
    """Seconds of an all-reduce over `size` GPUs: a ring in each node, a ring between the nodes."""
    inside, nodes = min(size, NODE_GPUS), max(1, size // NODE_GPUS)
    seconds = 2 * (inside - 1) / inside * gradient_bytes / NODE_BANDWIDTH + 2 * (inside - 1) * HOP_SECONDS
    return seconds + (
        2 * (nodes - 1) / nodes * gradient_bytes / inside / NETWORK_BANDWIDTH + 2 * (nodes - 1) * HOP_SECONDS
    )


def model(size: int, cost: Overheads) -> tuple[float, ...]:
    """Seconds of a private step on `size` GPUs, and its efficiency.

    Computing, what filling up adds, noise that computing does not hide, name and sample, the ledger, the
    all-reduce.
    """
    share = IMAGES / size
    largest = math.ceil(share + 3 * math.sqrt(share))  # as in privacy.batching.physical_batch_size
    batches = math.ceil(largest / (GPU_COPIES // MODEL_COPIES))
    filled = batches * math.ceil(largest / batches)
    image = MODEL_COPIES * IMAGE_SECONDS
    # A thread draws meanwhile, in parts for all cores of the rank.
    noise = max(0.0, cost.noise / CORES - filled * image)
    parts = (share * image, (filled - share) * image, noise, cost.name + cost.sample, cost.ledger / SETTLED)
    seconds = (*parts, all_reduce(size, NUMBERS * 4))
    return *seconds, IMAGES * image / size / sum(seconds)


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", choices=("pretrain", "finetune"), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="0: the model alone")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    if arguments.rounds:
        print(
            f"1.75M DDPM++, {BATCH} images a step ({COPIES} copies each in fine-tuning), {arguments.device}, "
            f"medians of {arguments.rounds} interleaved rounds"
        )
        print(
            f"{'':10}{'ranks':>7}{'s':>10}{'efficiency':>12}{'the limit':>12}{'all-reduces':>13}{'bytes':>12}"
        )
        for work in ("pretrain", "finetune"):
            compare(work, arguments.ranks, arguments.device, arguments.rounds)
    cost = overheads()
    print(
        f"\nmodel of a private step of {IMAGES:,} images x {MODEL_COPIES} copies, {IMAGE_SECONDS * 1e6:.0f} "
        f"us an image and copy on one GPU, {CORES} cores a GPU; seconds"
    )
    print(
        f"measured here on one core: noise {cost.noise:.4f}, name {cost.name:.4f}, sample {cost.sample:.4f}; "
        f"a write of the ledger {cost.ledger:.4f}, one in {SETTLED} steps"
    )
    names = ("computing", "filling up", "noise", "name, sample", "ledger", "all-reduce", "efficiency")
    print(f"{'GPUs':>6}" + "".join(f"{name:>14}" for name in names))
    for size in (1, 8, 64, 512):
        print(f"{size:>6}" + "".join(f"{value:14.5f}" for value in model(size, cost)))


def compare(work: str, sizes: list[int], device: str, rounds: int) -> None:
    """Print a row for one rank and for each of `sizes`."""
    worlds = [Ranks(work, 1, device)]
    for size in sizes:
        worlds += [Ranks(work, size, device), Ranks(work, size, device, strangers=True)]
    try:
        for world in worlds:
            world.step()
        taken = [[world.step() for world in worlds] for _ in range(rounds)]
    finally:
        for world in worlds:
            world.close()
    alone, *others = (statistics.median(step[number][0] for step in taken) for number in range(len(worlds)))
    print(f"{work:10}{1:7}{alone:10.3f}")
    for number, size in enumerate(sizes):
        together, apart = others[2 * number : 2 * number + 2]
        _, calls, count = taken[0][1 + 2 * number]
        traffic = f"{calls:>13}{count:>12,}" if work == "finetune" else f"{'by DDP':>13}"
        row = f"{work:10}{size:7}{together:10.3f}{alone / together / size:12.2f}{alone / apart / size:12.2f}"
        print(row + traffic, flush=True)


if __name__ == "__main__":
    main()
