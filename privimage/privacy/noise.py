"""Gaussian noise from a cryptographic generator, drawn in a thread while gradients are computed."""

import hmac
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import numpy as np
import torch

CHUNK = 1 << 17  # numbers of one generator; the float64 scratch stays in the cache


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


def gaussian(
    source: str, key: bytes, size: int, standard_deviation: float, threads: Executor | None = None
) -> np.ndarray:
    """`size` float64 draws of N(0, standard_deviation^2), each the scaled sum of four draws.

    The sum of four takes away the holes that a single floating-point Gaussian has, by which an attacker could
    tell the noise from the value (Mironov 2012; Holohan and Braghin 2021, Algorithm 1). Every `CHUNK` numbers
    have a generator of their own, whose key is derived from `key`: `threads` draw them at the same time, and
    the numbers are the same for any number of threads.
    """
    noise = np.empty(size)

    def fill(start: int) -> None:
        part = noise[start : start + CHUNK]
        # Four draws of deviation sigma / 2 have deviation sigma together.
        generator = np.random.Generator(bit_generator(source, _chunk_key(key, start)))
        generator.standard_normal(out=part)
        for _ in range(3):
            part += generator.standard_normal(len(part))
        part *= standard_deviation / 2

    starts = range(0, size, CHUNK)
    for _ in threads.map(fill, starts) if threads else map(fill, starts):
        pass
    return noise


def _chunk_key(key: bytes, start: int) -> bytes:
    """The key of the numbers from `start` on, 32 bytes (HMAC-SHA256 as a pseudo-random function of it)."""
    return hmac.digest(key, b"privimage noise" + start.to_bytes(8, "big"), "sha256")


class NoiseStream:
    """The noise of one rank for the private steps, drawn in another thread while the gradients are
    computed.

    `size` numbers per step, of standard deviation `standard_deviation`, from the step's key, by `threads`
    threads.
    """

    def __init__(self, source: str, size: int, standard_deviation: float, threads: int = 1):
        self.source, self.size, self.standard_deviation = source, size, standard_deviation
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="noise")
        self.threads = ThreadPoolExecutor(threads, thread_name_prefix="noise-part")
        self.drawn: Future[np.ndarray] | None = None

    def prepare(self, key: bytes) -> None:
        """Begin to draw the noise of a step from its key, 32 bytes that no other step has."""
        self.drawn = self.worker.submit(
            gaussian, self.source, key, self.size, self.standard_deviation, self.threads
        )

    def take(self) -> torch.Tensor:
        """The noise of the step that was prepared, once: float64 (size,) on the CPU."""
        if self.drawn is None:
            raise RuntimeError("no noise was prepared: the same noise is never given twice")
        noise, self.drawn = self.drawn.result(), None
        return torch.from_numpy(noise)

    def close(self) -> None:
        """Forget what was drawn."""
        self.worker.shutdown(wait=True, cancel_futures=True)
        self.threads.shutdown(wait=True, cancel_futures=True)
        self.drawn = None
