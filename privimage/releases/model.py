"""The released model: model.pt for this package, model.safetensors with config.json for other programs."""

import json
from pathlib import Path
from typing import Any

import torch

from privimage import __version__
from privimage.config import Config
from privimage.families import family
from privimage.storage.files import write_whole


def write_model(folder: Path, config: Config, weights: dict[str, Any]) -> None:
    """Write the averaged weights `ema` of the generator, and what is needed to sample from it.

    `weights` is what the training stage has left, with `classes` and `n_classes` (0 for an unlabelled set),
    and the state of a private `classifier` where there is one.
    """
    from safetensors.torch import save_file

    # A released model loads on machines without a GPU.
    on_cpu = {name: value.cpu() for name, value in weights["ema"].items()}
    n_classes, data = weights["n_classes"], config.data
    shape = {"resolution": data.resolution, "channels": data.channels, "n_classes": n_classes}
    settings = config.model_dump(mode="json", include={"method", "model", "synthesize"})
    known = {"classes": weights["classes"], "generator": config.spec.generator} | settings | shape
    classifier = {"classifier": weights["classifier"]} if "classifier" in weights else {}
    torch.save({"weights": on_cpu} | known | classifier, folder / "model.pt")
    # Each tensor in memory of its own, as the format wants it.
    save_file(
        {name: value.contiguous().clone() for name, value in on_cpu.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    described = json.dumps(_described(config, weights["classes"], n_classes), indent=2)
    write_whole(folder / "config.json", f"{described}\n".encode())


def _described(config: Config, classes: list[str], n_classes: int) -> dict[str, Any]:
    """config.json: the network by name and arguments, under the keys of diffusers where it has them."""
    kind = family(config)
    name, arguments = kind.architecture(config, n_classes)
    return {
        "_class_name": name,
        "_privimage_version": __version__,
        "sample_size": config.data.resolution,
        "in_channels": config.data.channels,
        "out_channels": config.data.channels,
        "num_class_embeds": n_classes or None,
        "id2label": {str(label): of_class for label, of_class in enumerate(classes)} if n_classes else {},
        "method": config.method,
        "arguments": arguments,
        "sampling": kind.sampling(config),
    }
