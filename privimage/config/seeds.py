"""Seeds of public randomness, all derived from `runtime.seed` in one way."""

import hashlib

from privimage.config.settings import Config


def public_seed(config: Config, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose (and step, rank, epoch ...), from `runtime.seed`.

    Different purposes or numbers give independent seeds, also across different values of `runtime.seed`:
    the seed is a prefix of SHA-256 over all of them. Never used for private randomness, whose keys come from
    `privimage.privacy.keys`.
    """
    text = "|".join(map(str, (config.runtime.seed, purpose, *numbers)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
