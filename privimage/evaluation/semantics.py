"""Semantic distribution similarity of two image sets, from the names of their classes (paper, Eq. 5)."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from privimage.errors import UserError


@contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """The npz at `path`.

    Raises UserError that names it where it, or what is read of it, is not as it should be.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            yield data
    except OSError as error:
        raise UserError(f"evaluate.word_vectors: {path}: {error.strerror or 'not readable as npz'}") from None
    except (AttributeError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile):
        raise UserError(
            f"evaluate.word_vectors: {path}: expected an npz with `words` and `vectors`"
        ) from None


def check_vectors(path: Path) -> None:
    """See that `load_vectors` will find both arrays, without reading them. Raises the same UserError."""
    with _opened(path) as data:
        if not {"words", "vectors"} <= set(data.files):
            raise KeyError


def load_vectors(path: Path) -> dict[str, np.ndarray]:
    """Word vectors from an npz with `words` (W,) and `vectors` (W, D).

    Raises UserError that names a file without them.
    """
    with _opened(path) as data:
        words, vectors = data["words"], data["vectors"].astype(np.float64)
    if vectors.ndim != 2 or len(words) != len(vectors):
        raise UserError(
            f"evaluate.word_vectors: {path}: {len(words)} words do not match vectors of shape {vectors.shape}"
        )
    return {str(word).lower(): vector for word, vector in zip(words, vectors, strict=True)}


def embed(name: str, vectors: dict[str, np.ndarray]) -> np.ndarray | None:
    """Unit-length word vector (D,) of a class name: the mean over its known words; None if none is known."""
    known = [vectors[word] for word in re.findall(r"[^\W_]+", name.lower()) if word in vectors]
    if not known:
        return None
    mean = np.mean(known, 0)
    return mean / max(float(np.linalg.norm(mean)), 1e-12)


def similarity(
    names_a: Sequence[str],
    counts_a: np.ndarray,
    names_b: Sequence[str],
    counts_b: np.ndarray,
    vectors: dict[str, np.ndarray],
) -> dict:
    """SDS(A, B) = sum_i sum_j f_A(i) f_B(j) cos(e_i, e_j), with f the class frequencies (Eq. 5).

    Classes without any known word are left out of the frequencies. Returns `sds` in [-1, 1] (None where a set
    has no known class) and `covered`, the shares of the images of A and of B whose class has a vector.
    """
    means, covered = [], []
    # The weighted mean of the unit vectors of each set's class names.
    for names, counts in ((names_a, counts_a), (names_b, counts_b)):
        known = [
            (count, vector)
            for name, count in zip(names, counts, strict=True)
            if count > 0 and (vector := embed(name, vectors)) is not None
        ]
        weight = float(sum(count for count, _ in known))
        covered.append(weight / max(float(np.sum(counts)), 1e-12))
        means.append(sum(count * vector for count, vector in known) / weight if known else None)
    # the double sum is the product of the two weighted means of unit vectors
    sds = float(means[0] @ means[1]) if means[0] is not None and means[1] is not None else None
    return {"sds": sds, "covered": covered}
