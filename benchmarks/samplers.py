"""Samplers of the diffusion methods at equal numbers of network calls, on the network of a finished run.

    python benchmarks/samplers.py RUN [--samples 500]

RUN is a run of a diffusion method that ended (`make quickstart` makes runs/quickstart). For each sampler and
number of steps: the network calls per image, the RMS distance of the images in [-1, 1] from the exact
solution (Heun's method with 100 steps from the same latents), and the distance of the set to the held-out
images in the features of the stand-in network. For a table about samplers; the settings of a run should not
be chosen by it.
"""

import argparse
from pathlib import Path

import torch

from privimage.config import load
from privimage.data.sources import open_sensitive
from privimage.distributed.world import ALONE
from privimage.evaluation import extractor, fidelity
from privimage.families import family
from privimage.families.base import image_shape
from privimage.models import edm
from privimage.runs.release import Release
from privimage.storage.rundir import RunDir

TRIED: tuple[tuple[edm.Sampler, int], ...] = (
    ("euler", 18),
    ("euler", 50),
    ("heun", 9),
    ("dpm++", 8),
    ("dpm++", 12),
    ("dpm++", 18),
    ("dpm++", 25),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=500)
    given = parser.parse_args()
    config, run = load(given.run / "config.yaml"), RunDir(given.run)
    model = Release(given.run)._model
    generator = (
        family(config).restored(config, {"ema": model["weights"], "n_classes": model["n_classes"]}).eval()
    )
    test = open_sensitive(config, "test", ALONE, run.sensitive)
    network = extractor.choose("stand-in", None, run.private)
    real = fidelity.extract(network, test.images[:], ALONE, "held-out images")
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(given.samples, *image_shape(config), generator=random)
    labels = torch.arange(given.samples) % model["n_classes"] if model["n_classes"] else None

    def images(sampler: edm.Sampler, steps: int) -> torch.Tensor:
        parts = zip(
            latents.split(500), labels.split(500) if labels is not None else [None] * 99, strict=False
        )
        return torch.cat([edm.sample(generator, x, y, sampler, steps) for x, y in parts])

    exact = images("heun", 100)
    print(
        "| sampler | steps | network calls | RMS from the exact solution | stand-in FD to held-out images |"
    )
    print("|---|---|---|---|---|")
    for sampler, steps in (*TRIED, ("heun", 100)):
        made = images(sampler, steps)
        error = (made - exact).square().mean().sqrt().item()
        features = fidelity.extract(network, edm.to_uint8(made).numpy(), ALONE, f"{sampler} {steps}")
        distance = fidelity.frechet_distance(features, real)
        calls = 2 * steps - 1 if sampler == "heun" else steps
        print(f"| {sampler} | {steps} | {calls} | {error:.4f} | {distance:.4f} |", flush=True)


if __name__ == "__main__":
    main()
