"""Starter weights: networks trained on all of a public set, from which other runs begin.

A starter is a folder with a query network and a class-conditional diffusion model, each as safetensors in
half precision, and a card. Each file states by itself what its weights were trained on: weights of which that
is not known are refused, since those that a sensitive set has made must not be used without its charges.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.distributed import told
from privimage.distributed.world import ALONE, World
from privimage.errors import UserError
from privimage.families.denoising import LABEL
from privimage.models import diffusion_arguments
from privimage.storage.files import write_whole

Network = Literal["query", "diffusion"]
STAGES: dict[Network, str] = {"query": "query", "diffusion": "pretrain"}  # that begin with them
LARGEST = 10_000_000  # bytes of a file
STATED = "privimage_starter"  # key of the statement in the metadata of a file
# A folder for each that comes with PrivImage; not there without the repository.
SHIPPED = Path(__file__).resolve().parents[2] / "starter"
FIRST = "network.embed_1"  # the layer that sees the label embedding, beside that of the noise level


@dataclass(frozen=True)
class Starter:
    """One network of a starter."""

    path: Path
    stated: dict[str, Any]  # network, architecture, classes, data, licence, steps, images_seen ...
    weights: dict[str, Tensor]  # by name, float32 where they are real numbers

    @property
    def classes(self) -> list[str]:
        """Names of the public classes that it was trained on."""
        return self.stated["classes"]

    @property
    def described(self) -> str:
        """What it was trained on, in a few words."""
        return f"{self.path}, trained on {self.stated['data']} ({self.stated['images_seen']:,} images seen)"

    def require(self, key: str, architecture: Mapping[str, Any]) -> None:
        """Refuse another network than `architecture`, in one line. Raises UserError."""
        if others := self.other_than(architecture):
            name = others[0]
            has, wanted = self.stated["architecture"].get(name), architecture[name]
            raise UserError(f"{key}: {self.path} is of another network: {name} {has}, not {wanted}")

    def other_than(self, architecture: Mapping[str, Any]) -> list[str]:
        """What of an architecture this network does not have in common with it, by name."""
        own = self.stated["architecture"]
        return [name for name, wanted in architecture.items() if own.get(name) != wanted]


def wanted(config: Config) -> dict[Network, Path]:
    """The starters that a configuration names, by network."""
    paths: dict[Network, Path | None] = {
        "query": config.query.start_from,
        "diffusion": config.pretrain.start_from,
    }
    return {network: path for network, path in paths.items() if path is not None}


def shipped(config: Config) -> Path | None:
    """The folder of a starter that comes with PrivImage and has the networks of `config`, if there is one."""

    def suits(folder: Path) -> bool:
        return not any(
            read(folder, network, "starter").other_than(architecture(config, network)) for network in STAGES
        )

    return next((folder for folder in sorted(SHIPPED.glob("*/")) if suits(folder)), None)


def architecture(config: Config, network: Network) -> dict[str, Any]:
    """What two networks must have in common, so that one can begin with the weights of the other."""
    shape = {"resolution": config.data.resolution, "channels": config.data.channels}
    if network == "query":
        return shape | {"network": config.query.network}
    return {name: value for name, value in diffusion_arguments(config, 0).items() if name != "n_classes"}


def file_of(path: Path, network: Network) -> Path:
    """The file of a network in the folder of a starter; a file stands for itself."""
    return path / f"{network}.safetensors" if path.is_dir() else path


def size_in_half(network: nn.Module) -> int:
    """Bytes of a network in half precision, its buffers included; it may be on the meta device."""
    return sum(2 * value.numel() for value in network.state_dict().values())


def write(folder: Path, network: Network, state: Mapping[str, Tensor], stated: dict[str, Any]) -> Path:
    """Write one network, whole or not at all.

    Raises UserError for weights that half precision cannot hold.
    """
    halves = {}
    for name, value in state.items():
        halves[name] = (value.half() if value.is_floating_point() else value).contiguous().cpu().clone()
        if not torch.isfinite(halves[name]).all():
            raise UserError(f"{folder}: {name} is beyond half precision, or not finite: no starter")
    metadata = {"format": "pt", STATED: json.dumps(stated | {"network": network})}
    path = folder / f"{network}.safetensors"
    write_whole(path, safetensors.torch.save(halves, metadata))
    return path


def read(path: Path, network: Network, key: str, world: World = ALONE) -> Starter:
    """One network of a starter, of the setting `key`. All ranks call it together.

    Raises UserError, in one line, for a file that is missing, damaged, or not of a starter.
    """
    path = file_of(path, network)
    data = told.content(path, world)
    if data is None:
        raise UserError(f"{key}: {path}: no such file")
    try:
        weights = safetensors.torch.load(data)
        # A header of JSON, after its length in 8 bytes.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError):
        raise UserError(f"{key}: {path}: not a safetensors file, or damaged") from None
    if (said := header.get("__metadata__", {}).get(STATED)) is None:
        raise UserError(
            f"{key}: {path} does not state what it was trained on; weights that a sensitive set has made "
            "cannot be started from, `privimage starter` makes some from a public set"
        )
    stated = json.loads(said)
    if stated["network"] != network:
        raise UserError(f"{key}: {path} holds the {stated['network']} network, not the {network} one")
    whole = {name: value.float() if value.is_floating_point() else value for name, value in weights.items()}
    return Starter(path, stated, whole)


def digest_of(path: Path, network: Network) -> str:
    """The sha256 of the file of a network."""
    return hashlib.sha256(file_of(path, network).read_bytes()).hexdigest()


def denoiser_weights(starter: Starter, shares: np.ndarray) -> dict[str, Tensor]:
    """The weights of a denoiser for other classes, from those of a starter.

    `shares` (classes, classes of the starter) are the images of each class that the starter knows under each
    of its own: the embedding of a class is the mean of theirs, weighted by these. A class without any begins
    as "no label" does, which keeps its own embedding. Without classes, (0, ...), "no label" is taken into the
    layer that follows, which then computes the same.
    """
    weights = dict(starter.weights)
    *_, no_label = embeddings = weights.pop(LABEL)
    if len(shares):
        rows = torch.from_numpy(shares).float()
        known = rows.sum(1, keepdim=True)
        means = rows @ embeddings[:-1] / known.clamp(min=1e-12)
        return weights | {LABEL: torch.cat([torch.where(known > 0, means, no_label), no_label[None]])}
    weights[f"{FIRST}.bias"] = weights[f"{FIRST}.bias"] + weights[f"{FIRST}.weight"] @ no_label
    return weights


def classifier_weights(starter: Starter, fresh: nn.Module, classes: Sequence[str]) -> dict[str, Tensor]:
    """The weights of a query network for `classes`: by name what the starter knows, the rest as `fresh`."""
    state = {name: value.clone() for name, value in fresh.state_dict().items()}
    number = {name: place for place, name in enumerate(starter.classes)}
    for name, value in starter.weights.items():
        if not name.startswith("head."):
            state[name] = value
        elif len(state[name]) == len(classes):  # a row for each class
            for row, of_class in enumerate(classes):
                if of_class in number:
                    state[name][row] = value[number[of_class]]
    return state
