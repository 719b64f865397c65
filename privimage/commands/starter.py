"""`privimage starter`: weights for other runs to begin with, made from all of a public set."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.config.seeds import public_seed
from privimage.data import store
from privimage.data.sensitive import ImageDraws
from privimage.distributed import checkpoint
from privimage.distributed.world import World, alone
from privimage.errors import UserError
from privimage.evaluation import extractor, fidelity
from privimage.evaluation.figures import sample_grid
from privimage.evaluation.report import versions
from privimage.families import family, starter
from privimage.models import build_diffusion, parameters
from privimage.models.resnet import classifier
from privimage.recipes import settled
from privimage.recipes.facts import public_size
from privimage.releases.card import card_of_starter
from privimage.runs import pipeline
from privimage.stages.public_set import public_labels, query_network
from privimage.storage.files import write_whole
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say

METHOD = "private-evolution"  # which has both networks, and pretrains on all public images with their labels
SAMPLED_AS = "pdp-diffusion"  # whose samples are those of the pretrained model
STAGES = ("prepare", "query", "pretrain")


def run(config: Config, out: Path, licence: str, data: str) -> int:
    """Train both networks of a configuration on all of its public set, and write the folder `out`.

    The sensitive set is not opened: its size and classes must be stated. Everything else is below
    RUN-starter, where RUN is `run.dir`, and goes on there after an interruption. Returns the exit status.
    Raises UserError for a public set without labels, and for networks whose files would be too large.
    """
    public_size(config)  # an unstated size would be looked up in the sensitive set
    if not config.data.public.labelled:
        raise UserError("starter: the diffusion model is class-conditional, so the public set needs labels")
    place = config.run.model_copy(update={"dir": config.run.dir.with_name(f"{config.run.dir.name}-starter")})
    config = settled(config.model_copy(update={"run": place, "method": METHOD}), run=RunDir(place.dir))
    with torch.device("meta"):
        networks = {
            "model.width": build_diffusion(config, 1000),
            "query.network": classifier(config.query.network, config.data.channels, 1000),
        }
    for key, network in networks.items():
        if (size := starter.size_in_half(network)) > starter.LARGEST:
            raise UserError(f"{key}: a file of {size / 1e6:.0f} MB; those of a starter are below 10 MB")
    return pipeline.run(config, STAGES, partial(_write, config, out, licence, data))


def _write(config: Config, out: Path, licence: str, data: str, run_dir: RunDir, world: World) -> None:
    """Both networks in half precision, a grid of samples and the card."""
    out.mkdir(parents=True, exist_ok=True)
    public, device = public_labels(run_dir), world.device
    if len(public.names) < 2:
        raise UserError("starter: the diffusion model is class-conditional, and the public set has one class")
    common = {
        "classes": list(public.names),
        "data": data or _named(config),
        "images": len(public.of_images),
        "data_sha256": store.described(run_dir.public_store).sha256,
        "licence": licence,
        "versions": {name: versions()[name] for name in ("privimage", "torch")},
    }
    states = {
        "query": checkpoint.required(run_dir.stage("query") / "network.pt", "query", alone(device)),
        "diffusion": checkpoint.required(run_dir.stage("pretrain") / "weights.pt", "pretrain", alone(device)),
    }
    trained: dict[starter.Network, dict[str, Any]] = {}
    wanted = starter.wanted(config)
    for network, stage in starter.STAGES.items():
        settings = config.query if network == "query" else config.pretrain
        before = _before(wanted[network], network) if network in wanted else None
        trained[network] = common | {
            "architecture": starter.architecture(config, network),
            "steps": settings.steps,
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "begun_with": before and before.described,
            "images_seen": run_dir.require(stage)["images"] + (before.stated["images_seen"] if before else 0),
        }
    trained["query"] |= {
        "validation_accuracy": states["query"]["accuracy"],
        "parameters": parameters(query_network(config, public)),
    }
    starter.write(out, "query", states["query"]["network"], trained["query"])
    # The model that is judged is the one that is shipped, after rounding.
    model = _rounded(config, states["diffusion"], device)
    measured = _measured(config, run_dir, out, model, alone(device))
    trained["diffusion"] |= {"distance": measured, "parameters": parameters(model)}
    starter.write(out, "diffusion", model.state_dict(), trained["diffusion"])
    page = card_of_starter(trained["query"], trained["diffusion"], out.name)
    write_whole(out / "README.md", page.encode())
    out.chmod(0o755)  # nothing in it is sensitive
    for file in out.iterdir():
        file.chmod(0o644)
    say(f"starter: {out}, {measured['name']} {measured['distance']:.4g} of {measured['samples']} samples")


def _before(path: Path, network: starter.Network) -> starter.Starter:
    """The starter that a network began with."""
    found = starter.read(path, network, f"{starter.STAGES[network]}.start_from")
    # No place on this machine is told: the folder has the name of the starter.
    return replace(found, path=Path(starter.file_of(path, network).resolve().parent.name))


def _named(config: Config) -> str:
    """The public set by its kind and the last part of its path: no place on this machine."""
    public = config.data.public
    return f"{public.kind} {public.path.name}" if public.path is not None else public.kind


def _rounded(config: Config, weights: dict, device: torch.device) -> torch.nn.Module:
    """The averaged network, as half precision has it."""
    model = build_diffusion(config, weights["n_classes"]).to(device).eval()
    model.load_state_dict({name: value.half().float() for name, value in weights["ema"].items()})
    return model


def _measured(
    config: Config, run_dir: RunDir, out: Path, model: torch.nn.Module, world: World
) -> dict[str, Any]:
    """The distance of samples, labels in turn, to as many images of the public set; draws a grid of some."""
    kind = family(config.model_copy(update={"method": SAMPLED_AS}))
    public, draws = public_labels(run_dir), ImageDraws(world.device)
    count = min(config.evaluate.fidelity_samples, len(public.of_images))
    indices = torch.arange(count, device=world.device)
    labels = indices % len(public.names)
    with torch.inference_mode():
        parts: list[Tensor] = [
            kind.sample(config, model, labels[block], block, draws).cpu()
            for block in indices.split(config.synthesize.batch_size)
        ]
    samples = torch.cat(parts).numpy()
    sample_grid(out / "samples.png", samples, labels.cpu().numpy(), len(public.names))
    order = np.random.default_rng(public_seed(config, "starter images")).permutation(len(public.of_images))
    real = store.read(run_dir.public_store, np.sort(order[:count]))
    settings = config.evaluate
    network = extractor.choose(settings.features, settings.inception_weights, run_dir.private)
    features = [fidelity.extract(network, images, world, "features") for images in (samples, real)]
    return {
        "name": network.name,
        "distance": fidelity.frechet_distance(*features),
        "samples": count,
    }
