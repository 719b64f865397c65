"""Strong scaling of pretraining and private fine-tuning from one rank to more, and what 64 or 512 GPUs would
take.

    python benchmarks/scaling.py [--device cuda] [--ranks 2] [--rounds 5]

The same global batch on 1 rank and on `--ranks` ranks, one thread each on a CPU, in turn in one run; medians.
Beside them the machine's own limit: as many processes that share the work and nothing else, since cores share
memory. Also counts the all-reduces of a logical step and their bytes, and models the time on clusters from
the measured computing and stated figures of a network.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

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
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import FoldedGradients
from privimage.privacy.keys import insecure_fixed
from privimage.privacy.mechanisms import DPSGD

BATCH, COPIES, PHYSICAL, COUNT = (
    128,
    2,
    16,
    1280,
)  # images of a step over all ranks, noise copies, images at once, images of the set

# A node of 8 GPUs on NVLink, nodes on one 400 Gb/s InfiniBand port a GPU: what their makers state, halved.
NODE_BANDWIDTH, NETWORK_BANDWIDTH, HOP_SECONDS, NODE_GPUS = 225e9, 25e9, 10e-6, 8


def pretraining(world: World, batch: int):
    """A function that takes one step on this rank's share and returns the number of images of all ranks."""
    config = parse(
        {
            "run": {"dir": "none"},
            "data": {"resolution": 32, "public": {"kind": "glyphs"}, "sensitive": {"kind": "digits"}},
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


def model(compute_seconds: float, size: int, gradient_bytes: int) -> tuple[float, float]:
    """Seconds of computing and of the all-reduce of a step on `size` GPUs.

    A ring in each node, a ring between the nodes.

    `compute_seconds` is the time of the whole batch on one GPU.
    """
    inside, nodes = min(size, NODE_GPUS), max(1, size // NODE_GPUS)
    seconds = 2 * (inside - 1) / inside * gradient_bytes / NODE_BANDWIDTH + 2 * (inside - 1) * HOP_SECONDS
    seconds += (
        2 * (nodes - 1) / nodes * gradient_bytes / inside / NETWORK_BANDWIDTH + 2 * (nodes - 1) * HOP_SECONDS
    )
    return compute_seconds / size, seconds


def main() -> None:
    """Run and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", choices=("pretrain", "finetune"), help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    print(
        f"1.75M DDPM++, {BATCH} images a step ({COPIES} copies each in fine-tuning), {arguments.device}, "
        f"medians of {arguments.rounds} interleaved rounds"
    )
    print(
        f"{'':10}{'1 rank, s':>12}{f'{arguments.ranks} ranks, s':>12}{'efficiency':>12}{'the limit':>12}"
        f"{'all-reduces':>13}{'bytes':>12}"
    )
    for work in ("pretrain", "finetune"):
        worlds = [Ranks(work, 1, arguments.device), Ranks(work, arguments.ranks, arguments.device)]
        worlds.append(Ranks(work, arguments.ranks, arguments.device, strangers=True))
        try:
            for world in worlds:
                world.step()
            rounds = [[world.step() for world in worlds] for _ in range(arguments.rounds)]
        finally:
            for world in worlds:
                world.close()
        alone, together, apart = (
            statistics.median(step[number][0] for step in rounds) for number in range(3)
        )
        _, calls, count = rounds[0][1]
        traffic = f"{calls:>13}{count:>12,}" if work == "finetune" else f"{'by DDP':>13}{'':>12}"
        print(
            f"{work:10}{alone:12.3f}{together:12.3f}{alone / together / arguments.ranks:12.2f}"
            f"{alone / apart / arguments.ranks:12.2f}{traffic}",
            flush=True,
        )
    print(
        "\nmodel of a private step of 16,384 images x 8 copies, 100 us an image and copy on one GPU; seconds"
    )
    print(f"{'GPUs':>6}{'computing':>12}{'all-reduce':>12}{'efficiency':>12}")
    for size in (1, 8, 64, 512):
        compute, network = model(16_384 * 8 * 100e-6, size, 1_754_499 * 4)
        print(f"{size:>6}{compute:12.4f}{network:12.5f}{compute / (compute + network):12.3f}")


if __name__ == "__main__":
    main()
