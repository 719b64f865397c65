"""The identity of a computation on sensitive data: a digest of everything its outputs depend on.

Noise, Poisson sample and charge of each use of a mechanism are derived from it. The same computation, started
again after a crash, from a copy or from an older snapshot, repeats its output to the bit and is charged once.
Any other computation, even one that differs in rounding only, has other noise and is charged: the difference
of two outputs contains both noises.
"""

import hashlib
import json
import os
import platform
import secrets
from collections.abc import Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privimage.config import Config
from privimage.config.effects import effect, settings_of, settings_of_plan
from privimage.config.stages import upstream
from privimage.distributed.agreement import Ranks, gathered
from privimage.privacy.keys import RootKey

PROCESSOR = Path("/proc/cpuinfo")
KERNEL_SWITCHES = (
    "ATEN_",
    "DNNL_",
    "ONEDNN_",
    "MKL_",
    "KMP_",
    "OPENBLAS_",
    "CUBLAS_",
)  # beginnings of variables by which libraries choose kernels


def computation(
    ranks: Ranks,
    root: RootKey,
    content: bytes,
    config: Config,
    stage: str,
    own: dict[str, Any],
    inputs: Iterable[bytes] = (),
    each_rank: bool = False,
) -> bytes:
    """The digest of all that the outputs of a stage depend on beside the state that it goes on from.

    The same on all ranks.

    Args:
        content: digest of the sensitive set.
        stage: the stage that draws; the settings that it depends on are in the digest.
        own: plain values that the stage adds.
        inputs: digests of networks that see the sensitive set, or of what its images vote for.
        each_rank: whether the output depends on which rank does what, as where each adds noise of its own;
            else it depends on the kinds of machines alone, not on their number.

    On a GPU, where sums need not repeat to the bit, each start is another computation. All ranks call
    this together.
    """
    digests = gathered(ranks, digest_of(json.dumps(_machine(ranks.device), sort_keys=True).encode()))
    machines = [machine.hex() for machine in digests]
    # Everything in here changes the noise. What is left out must not change any output bit.
    tree = {
        "content": content.hex(),
        "settings": settings_read(config, stage),
        "inputs": [digest.hex() for digest in inputs],
        "stage": stage,
        "own": own,
        "key": root.name,
        "machines": machines if each_rank else sorted(set(machines)),
        "start": secrets.token_hex(16) if ranks.device.type == "cuda" else "",
    }
    return gathered(ranks, digest_of(json.dumps(tree, sort_keys=True).encode()))[0]


def settings_read(config: Config, stage: str) -> dict:
    """The settings that an output of a stage may depend on, as plain values.

    Without those that say where images and weights are: the content of both sets is in the digest by itself,
    that of the public one through the networks that it trained, and so are weights.
    """
    # Settings of all stages up to this one, since their outputs are its inputs.
    settings = settings_of(config, upstream(stage, config.stages)) | settings_of_plan(config)
    return {key: value for key, value in settings.items() if not effect(key).place}


def digest_of(*parts: bytes) -> bytes:
    """SHA-256 of some bytes; where a part begins matters."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()


def digest_of_tensors(tensors: Iterable[Tensor | np.ndarray]) -> bytes:
    """SHA-256 of the values, shapes and types of arrays of any shape, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        # On the CPU, whatever the device: digests are compared between machines.
        array = (
            tensor.detach().cpu().contiguous()
            if isinstance(tensor, Tensor)
            else torch.from_numpy(np.ascontiguousarray(tensor))
        )
        digest.update(f"{array.dtype} {tuple(array.shape)}\0".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _machine(device: torch.device) -> dict:
    """Everything that affects output bits on one rank; equal means replayable.

    Processor, threads, software and the switches by which libraries choose kernels.
    """
    return {
        "processor": _processor(device),
        "threads": torch.get_num_threads(),
        "software": _software(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "products": torch.get_float32_matmul_precision(),
        "switches": sorted(
            f"{name}={value}" for name, value in os.environ.items() if name.startswith(KERNEL_SWITCHES)
        ),
    }


def _processor(device: torch.device) -> str:
    """Model of the GPU, or of the CPU with its instruction sets: libraries choose kernels by them."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = PROCESSOR.read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.platform()
    return "\n".join(
        line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))
    )


@cache
def _software() -> str:
    """Digest of this package's source, and of the versions of the packages that compute for it."""
    package = Path(__file__).parents[1]
    sources = [path.read_bytes() for path in sorted(package.rglob("*.py"))]
    names = ("torch", "torchvision", "opacus", "numpy", "pillow", "randomgen")
    versions = [f"{name} {metadata.version(name)}".encode() for name in names]
    return digest_of(platform.python_version().encode(), *versions, *sources).hex()
