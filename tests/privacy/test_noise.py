"""The noise: Gaussian, of the right size, from the right keys. False-alarm rates are stated.

All keys are fixed.
"""

import hmac
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy import stats

from privimage.privacy.keys import RootKey, destroy, insecure_fixed, open_root
from privimage.privacy.noise import CHUNK, NoiseStream, gaussian

KEY = insecure_fixed(3)
SOURCES = ["aes-ctr", "chacha20", "insecure-philox"]


@pytest.mark.parametrize("source", SOURCES)
def test_noise_is_gaussian_of_the_stated_deviation(source: str) -> None:
    """Kolmogorov-Smirnov and a chi-squared test of the variance, false-alarm rate 1e-3 each."""
    draws = gaussian(source, KEY.derive("test"), 200_000, 2.5)
    assert stats.kstest(draws / 2.5, "norm").pvalue > 1e-3
    statistic = (draws**2).sum() / 2.5**2
    assert 5e-4 < stats.chi2.cdf(statistic, len(draws)) < 1 - 5e-4


def test_four_draws_are_combined() -> None:
    """The first number is half the sum of the four streams' first numbers, so no single draw can be
    recognised in it.
    """
    import randomgen

    key = KEY.derive("test")
    first = hmac.digest(key, b"privimage noise" + bytes(8), "sha256")
    generator = np.random.Generator(randomgen.AESCounter(key=int.from_bytes(first[:16], "big")))
    parts = [generator.standard_normal(10) for _ in range(4)]
    assert np.allclose(gaussian("aes-ctr", key, 10, 2.0), sum(parts), rtol=1e-15)


@pytest.mark.parametrize("source", SOURCES)
def test_threads_do_not_change_the_noise(source: str) -> None:
    size = 3 * CHUNK + 17
    with ThreadPoolExecutor(3) as threads:
        shared = gaussian(source, KEY.derive("test"), size, 1.0, threads)
    alone = gaussian(source, KEY.derive("test"), size, 1.0)
    assert (shared == alone).all()
    # No part repeats another one.
    parts = alone[: 3 * CHUNK].reshape(3, CHUNK)
    assert np.abs(np.corrcoef(parts) - np.eye(3)).max() < 0.012  # false-alarm rate about 1e-4


def test_no_two_numbers_of_a_long_stream_are_equal() -> None:
    draws = gaussian("aes-ctr", KEY.derive("test"), 1_500_000, 1.0)
    assert len(np.unique(draws)) == len(draws)


def test_the_noise_of_a_key_is_repeatable_and_that_of_another_is_another() -> None:
    stream = NoiseStream("aes-ctr", 100, 1.0)

    def noise(*context: int | str) -> torch.Tensor:
        stream.prepare(KEY.derive("noise", *context))
        return stream.take()

    base = noise("a", 0)
    assert torch.equal(base, noise("a", 0))
    for other in (noise("b", 0), noise("a", 1)):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.4
    stream.close()


def test_noise_is_given_once() -> None:
    """A step without noise of its own must not go on with that of the step before."""
    stream = NoiseStream("chacha20", 50, 1.0)
    stream.prepare(KEY.derive("noise"))
    stream.take()
    with pytest.raises(RuntimeError, match="the same noise is never given twice"):
        stream.take()
    stream.close()


def test_derived_keys_do_not_collide() -> None:
    """Contexts that would read the same when joined must differ: ('a', 12) and ('a1', 2), 1 and '1'."""
    derived = [
        KEY.derive("a", 12),
        KEY.derive("a", 1, 2),
        KEY.derive("a1", 2),
        KEY.derive("a", "12"),
        KEY.derive("a", 1, "2"),
    ]
    assert len(set(derived)) == len(derived)


def test_a_new_key_is_secret_and_kept(tmp_path) -> None:
    path = tmp_path / "root.key"
    first = open_root(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert open_root(path).derive("x") == first.derive("x")
    assert open_root(tmp_path / "other.key").derive("x") != first.derive("x")


def test_a_key_is_not_shown() -> None:
    key = RootKey(bytes(range(32)))
    assert bytes(range(32)).hex() not in repr(key) + str(key) + key.name


def test_a_destroyed_key_is_gone(tmp_path) -> None:
    path = tmp_path / "root.key"
    open_root(path)
    destroy(path)
    assert not path.exists()
    destroy(path)
