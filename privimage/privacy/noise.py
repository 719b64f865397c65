"""Gaussian noise from a cryptographic generator, drawn in a thread while gradients are computed."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

CHUNK = 1 << 19  # numbers drawn at once, so that the float64 scratch stays in the cache


def bit_generator(source: str, key: bytes) -> np.random.BitGenerator:
    """A generator of the given kind from 32 secret bytes.

    `aes-ctr`, `chacha20`, or the not cryptographic `insecure-philox`.
    """
    import randomgen

    if source == "aes-ctr":
        return randomgen.AESCounter(key=int.from_bytes(key[:16], "big"))
    if source == "chacha20":
        return randomgen.ChaCha(key=int.from_bytes(key, "big"), rounds=20)
    return np.random.Philox(key=int.from_bytes(key[:16], "big"))


def gaussian(source: str, key: bytes, size: int, standard_deviation: float) -> np.ndarray:
    """`size` float64 draws of N(0, standard_deviation^2), each the scaled sum of four draws.

    The sum of four takes away the holes that a single floating-point Gaussian has, by which an attacker could
    tell the noise from the value (Mironov 2012; Holohan and Braghin 2021, Algorithm 1).
    """
    generator = np.random.Generator(bit_generator(source, key))
    noise = np.empty(size)
    for start in range(0, size, CHUNK):
        part = noise[start : start + CHUNK]
        # Four draws of deviation sigma / 2 have deviation sigma together.
        generator.standard_normal(out=part)
        for _ in range(3):
            part += generator.standard_normal(len(part))
        part *= standard_deviation / 2
    return noise


class NoiseStream:
    """The noise of one rank for the private steps, drawn in another thread while the gradients are
    computed.

    `size` numbers per step, of standard deviation `standard_deviation`, from the step's key.
    """

    def __init__(self, source: str, size: int, standard_deviation: float):
        self.source, self.size, self.standard_deviation = source, size, standard_deviation
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self.drawn: Future[np.ndarray] | None = None

    def prepare(self, key: bytes) -> None:
        """Begin to draw the noise of a step from its key, 32 bytes that no other step has."""
        self.drawn = self.worker.submit(gaussian, self.source, key, self.size, self.standard_deviation)

    def take(self) -> torch.Tensor:
        """The noise of the step that was prepared, once: float64 (size,) on the CPU."""
        if self.drawn is None:
            raise RuntimeError("no noise was prepared: the same noise is never given twice")
        noise, self.drawn = self.drawn.result(), None
        return torch.from_numpy(noise)

    def close(self) -> None:
        """Forget what was drawn."""
        self.worker.shutdown(wait=True, cancel_futures=True)
        self.drawn = None
