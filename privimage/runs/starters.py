"""The starters of a run: whether they fit, and what their content is."""

from collections.abc import Iterator

from privimage.config import Config
from privimage.config.stages import upstream
from privimage.families import starter
from privimage.runs.visit import Visit


def fitting(visit: Visit) -> Iterator[str]:
    """The weights that networks begin with are there, state what made them, and fit."""
    config = visit.config
    for network, path in starter.wanted(config).items():
        stage = starter.STAGES[network]
        if stage not in visit.stages:
            continue
        if network == "diffusion" and config.spec.generator == "gan":
            yield f"pretrain.start_from: starters are of diffusion models, {config.method} trains a GAN"
            continue
        key = f"{stage}.start_from"
        starter.read(path, network, key).require(key, starter.architecture(config, network))


def digests(config: Config, stage: str) -> dict[str, str]:
    """The sha256 of each starter that the result of a public stage depends on, by network."""
    stages = upstream(stage, config.stages)
    return {
        network: starter.digest_of(path, network)
        for network, path in starter.wanted(config).items()
        if starter.STAGES[network] in stages
    }
