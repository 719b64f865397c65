"""Whether the gradient of an image depends, in its last digits, on the other images of its physical batch.

    python benchmarks/neighbours.py [--device cuda --images 256] [--copies 2]

One image more must move the sum of a private step by its own gradient alone: rounding that goes by the other
images, their number, or an image's place among them would add to it. Prints, for fp32 and bf16, the largest
relative difference of an image's gradient, and for how many images it was equal to the bit: computed once
more, with other images beside it, at other places, in smaller batches that are filled up (as fine-tuning on
GPUs does) and in smaller ones that are not.
"""

import argparse
import copy

import torch
from private_step import batch, in_precision
from torch import Tensor

from privimage.models import edm
from privimage.models.ddpmpp import DDPMpp
from privimage.privacy.gradients import FoldedGradients


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--copies", type=int, default=1)
    arguments = parser.parse_args()
    device, images, copies = arguments.device, arguments.images, arguments.copies
    torch.manual_seed(0)
    network = edm.Denoiser(DDPMpp(32, 3, 10))
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.05)
    network.to(device)
    tensors = [t.to(device) for t in batch(2 * images, copies, "cpu")]
    whole, half = list(range(images)), images // 2
    batches = {
        "once more": (whole, images),
        "other images beside it": ([*whole[:half], *range(images, images + half)], images),
        "one place on": ([images, *whole[:-1]], images),
        "other places": (list(range(half, images + half)), images),
        "half as many, filled up": (whole[:half], images),
        "one alone, filled up": (whole[:1], images),
        "half as many": (whole[:half], 0),
        "one alone": (whole[:1], 0),
    }
    for precision in ("fp32", "bf16"):
        losses, ways = in_precision(device, precision), dict[str, str]()

        def gradients(chosen: list[int], filled_to: int, losses=losses, ways=ways) -> Tensor:
            own = copy.deepcopy(network)
            folded = FoldedGradients(own, ways, filled_to)
            folded.backward(losses, *(t[chosen] for t in tensors))
            ways.update(folded.choices)
            return torch.cat([p.grad_sample.double().flatten(1) for p in own.parameters()], dim=1)

        first = gradients(whole, images)
        print(f"{images} images x {copies} copies, {device}, {precision}")
        for name, (chosen, filled_to) in batches.items():
            found = gradients(chosen, filled_to)
            shared = [(place, index) for place, index in enumerate(chosen) if index < images]
            apart = torch.stack(
                [(found[place] - first[index]).norm() / first[index].norm() for place, index in shared]
            )
            print(
                (
                    f"    {name}: at most {apart.max().item():.1e}, equal for {(apart == 0).sum().item()} of "
                    f"{len(shared)}"
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
