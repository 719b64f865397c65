"""A log of every noise draw, with a digest of what it hides: the truth that a statement is held against."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from privimage.privacy.noise import NoiseStream
from privimage.privacy.optimizer import PrivateOptimizer
from privimage.stages import embedding as mean_embedding
from privimage.stages import evolve, select


@dataclass(frozen=True)
class Draw:
    """One use of a mechanism by one rank: the key of its noise, and what was hidden by it."""

    stage: str
    key: str
    hidden: str
    before: str = ""  # DP-SGD: the weights before and after the step
    after: str = ""


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[
        :24
    ]


def install(note: Callable[[Draw], None], replace: Callable[[object, str, object], None] = setattr) -> None:
    """Let each noise draw of this process be noted, just before it is used.

    `replace` is setattr or that of a MonkeyPatch.
    """
    prepare, step, histogram, embedding = (
        NoiseStream.prepare,
        PrivateOptimizer.step,
        select.noisy_histogram,
        mean_embedding.noisy_embedding,
    )

    def prepared(self: NoiseStream, key: bytes) -> None:
        self.spied = key.hex()  # type: ignore[attr-defined]
        prepare(self, key)

    add_noise = PrivateOptimizer.add_noise

    def weights(self: PrivateOptimizer) -> str:
        return digest(*(p.detach().cpu().numpy() for p in self.params))

    def noised(self: PrivateOptimizer) -> None:
        if self.noise is not None:
            self.spied = digest(self.gradient_sum.cpu().numpy())  # type: ignore[attr-defined]
        add_noise(self)

    def stepped(self: PrivateOptimizer, closure: object = None) -> bool:
        before = weights(self)
        made = step(self, closure)
        if made and self.noise is not None:
            note(Draw("finetune", self.noise.spied, self.spied, before, weights(self)))  # type: ignore[attr-defined]
        return made

    def counted(stage: str) -> Callable:
        def noisy(votes: np.ndarray, labels: np.ndarray, *rest) -> np.ndarray:
            note(Draw(stage, rest[-1].hex(), digest(votes, labels)))
            return histogram(votes, labels, *rest)

        return noisy

    def embedded(total: np.ndarray, *rest) -> np.ndarray:
        note(Draw("match", rest[-1].hex(), digest(total)))
        return embedding(total, *rest)

    replace(NoiseStream, "prepare", prepared)
    replace(PrivateOptimizer, "add_noise", noised)
    replace(PrivateOptimizer, "step", stepped)
    replace(select, "noisy_histogram", counted("select"))
    replace(evolve, "noisy_histogram", counted("evolve"))
    replace(mean_embedding, "noisy_embedding", embedded)


def one_noise_for_two(draws: Iterable[Draw]) -> list[str]:
    """The keys by which different things were hidden: whoever sees both knows their difference."""
    hidden = defaultdict(set)
    for draw in draws:
        hidden[draw.key].add(draw.hidden)
    return [key for key, found in hidden.items() if len(found) > 1]


def uses(draws: Iterable[Draw], stage: str) -> int:
    """How many different noises were drawn in a stage, by ranks that all draw (DP-SGD) or by the main rank
    alone.
    """
    return len({draw.key for draw in draws if draw.stage == stage})
