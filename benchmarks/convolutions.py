"""Per-image weight gradients of each kind of convolution.

The ways of `privacy/convolutions.py` in turn, beside the ordinary gradient.

    python benchmarks/convolutions.py [--device cuda --images 512] [--precision bf16] [--rounds 8]

Prints, for every convolution of another shape in the 1.75M DDPM++ of CIFAR-10, the median over interleaved
rounds of the ordinary weight gradient and of each way's as a multiple of it; at the end all layers together,
also with the best way for each.
"""

import argparse
from collections import Counter

import torch
from private_step import Step, interleaved
from torch import Tensor, nn

from privimage.models import edm
from privimage.models.ddpmpp import DDPMpp
from privimage.privacy.convolutions import WAYS, Folding
from privimage.telemetry import memory


def shapes(network: nn.Module) -> tuple[Counter, dict[tuple, nn.Conv2d]]:
    """How often each kind of convolution occurs: (inputs, outputs, kernel, side of its input).

    And one layer of each kind.
    """
    found, layers = Counter(), {}

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kind = (layer.in_channels, layer.out_channels, layer.kernel_size[0], inputs[0].shape[-1])
        found[kind] += 1
        layers[kind] = layer

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32), torch.ones(1), torch.zeros(1, dtype=torch.int64))
    return found, layers


def ordinary(layer: nn.Conv2d, x: Tensor, g: Tensor) -> None:
    """The weight gradient of the whole batch."""
    torch.ops.aten.convolution_backward(
        g,
        x,
        layer.weight.to(x.dtype),
        None,
        layer.stride,
        layer.padding,
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, False],
    )


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    memory.keep_freed()
    device, dtype = arguments.device, torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    folding, all_of = Folding(arguments.images, arguments.copies), arguments.images * arguments.copies
    found, layers = shapes(edm.Denoiser(DDPMpp(32, 3, 10)))
    print(
        f"{arguments.images} images x {arguments.copies} copies, {device}, {arguments.precision}; "
        "milliseconds, then multiples of the ordinary gradient"
    )
    total: Counter = Counter()
    for kind, often in sorted(found.items()):
        inputs, outputs, kernel, side = kind
        layer = layers[kind].to(device)
        x = torch.randn(all_of, inputs, side, side, device=device, dtype=dtype)
        g = torch.randn(all_of, outputs, side, side, device=device, dtype=dtype)
        runs: dict[str, Step] = {"ordinary": lambda layer=layer, x=x, g=g: ordinary(layer, x, g)}
        for name, way in WAYS.items():
            runs[name] = lambda way=way, layer=layer, x=x, g=g: way(layer, x, g, folding)
        took = {name: 1e3 * seconds for name, seconds in interleaved(runs, arguments.rounds, device).items()}
        for name, value in took.items():
            total[name] += often * value
        total["best"] += often * min(took[name] for name in WAYS)
        told = ", ".join(f"{name} {took[name] / took['ordinary']:.2f}" for name in WAYS)
        print(
            (
                f"{often:3d} of {inputs:3d} -> {outputs:3d}, {kernel}x{kernel} at {side:2d}: "
                f"{took['ordinary']:.3f} ms; {told}"
            ),
            flush=True,
        )
    told = ", ".join(f"{name} {total[name] / total['ordinary']:.2f}" for name in (*WAYS, "best"))
    print(f"all: {total['ordinary']:.2f} ms; {told}")


if __name__ == "__main__":
    main()
