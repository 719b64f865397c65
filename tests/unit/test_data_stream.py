"""The public stream.

The right images with the right labels, the same on any number of ranks, from any step on.
"""

import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import numbered, numbers, source_of

from privimage.data import beton, store, stream
from privimage.data.stream import PublicStream
from privimage.data.transforms import Form
from privimage.errors import UserError

COUNT = 60
INDICES = np.random.default_rng(2).permutation(COUNT)[:30]
NEW_LABELS = np.arange(30) % 7
LABEL_OF = dict(zip(INDICES.tolist(), NEW_LABELS.tolist(), strict=True))


@pytest.fixture(scope="module", params=[".npy", ".beton"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of each format."""
    if request.param == ".beton" and (missing := beton.ffcv_missing()):
        pytest.skip(missing)
    path = tmp_path_factory.mktemp("stream") / f"set{request.param}"
    store.write(source_of(numbered(COUNT), np.arange(COUNT) % 2), path, Form(8, 1), 0)
    return path


@pytest.fixture(autouse=True)
def short_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few batches cross from one pass of the loader to the next."""
    monkeypatch.setattr(stream, "SPAN", 4)


def made(
    path: Path,
    batch_size: int = 12,
    rank: int = 0,
    size: int = 1,
    seed: int = 5,
    indices: np.ndarray = INDICES,
    labels: np.ndarray = NEW_LABELS,
) -> PublicStream:
    return PublicStream(path, indices, labels, batch_size, rank, size, torch.device("cpu"), seed, 1)


def taken(made: PublicStream, count: int, start: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Which images come with which labels, batch by batch."""
    batches = made.batches(start)
    found = [(numbers(images.numpy()), labels.numpy()) for images, labels in islice(batches, count)]
    batches.close()
    return found


def test_a_batch_is_what_training_wants(path: Path) -> None:
    images, labels = next(made(path).batches())
    assert images.shape == (12, 1, 8, 8) and images.dtype == torch.uint8
    assert labels.shape == (12,) and labels.dtype == torch.int64
    which = numbers(images.numpy())
    assert (images.numpy() == numbered(COUNT)[which].transpose(0, 3, 1, 2)).all()


def test_every_image_comes_with_the_label_given_for_it(path: Path) -> None:
    for images, labels in taken(made(path), 10):
        assert [LABEL_OF[image] for image in images.tolist()] == labels.tolist()


def test_each_epoch_shows_every_chosen_image_once_in_a_new_order(path: Path) -> None:
    shown = np.concatenate([images for images, _ in taken(made(path), 5)])
    first, second = shown[:30], shown[30:]
    assert sorted(first) == sorted(second) == sorted(INDICES)
    assert first.tolist() != second.tolist()


def test_another_seed_is_another_order(path: Path) -> None:
    assert taken(made(path), 1)[0][0].tolist() != taken(made(path, seed=6), 1)[0][0].tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_same_global_batches(path: Path, size: int) -> None:
    """Each global batch is what one rank alone would take: the shares are disjoint, complete and in order."""
    alone = taken(made(path), 6)
    shares = [taken(made(path, 12 // size, rank, size), 6) for rank in range(size)]
    for step, (images, labels) in enumerate(alone):
        assert np.concatenate([share[step][0] for share in shares]).tolist() == images.tolist()
        assert np.concatenate([share[step][1] for share in shares]).tolist() == labels.tolist()


@pytest.mark.parametrize("start", [1, 3, 4, 7])
def test_going_on_from_any_step_is_as_if_undisturbed(path: Path, start: int) -> None:
    undisturbed = taken(made(path), 12)[start:]
    resumed = taken(made(path), 12 - start, start)
    assert [(a.tolist(), b.tolist()) for a, b in undisturbed] == [
        (a.tolist(), b.tolist()) for a, b in resumed
    ]


def test_fewer_images_than_a_batch_are_repeated_evenly(path: Path) -> None:
    few = made(path, batch_size=16, indices=INDICES[:5], labels=NEW_LABELS[:5])
    for images, _ in taken(few, 3):
        times = np.bincount(images, minlength=COUNT)[INDICES[:5]]
        assert times.sum() == 16 and times.max() - times.min() <= 2


def test_batches_that_are_kept_stay_as_they_were(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFCV fills the same few buffers again and again within a pass."""
    monkeypatch.setattr(stream, "SPAN", 16)
    batches = made(path).batches()
    kept = [images for images, _ in islice(batches, 12)]
    batches.close()
    for step, images in enumerate(kept):
        assert (images.numpy() == store.read(path, INDICES[made(path).positions(step)])).all()


def test_two_streams_at_once_do_not_disturb_each_other(path: Path) -> None:
    one, other = made(path).batches(), made(path, seed=6).batches()
    together = [
        (numbers(next(one)[0].numpy()).tolist(), numbers(next(other)[0].numpy()).tolist()) for _ in range(10)
    ]
    one.close(), other.close()
    assert [a for a, _ in together] == [images.tolist() for images, _ in taken(made(path), 10)]
    assert [b for _, b in together] == [images.tolist() for images, _ in taken(made(path, seed=6), 10)]


def test_torch_keeps_its_threads(path: Path) -> None:
    """FFCV's loader sets them to its own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        taken(made(path), 6)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("path", [".beton"], indirect=True)
def test_ffcv_is_as_it_was_once_no_stream_is_read(path: Path) -> None:
    from ffcv.pipeline.compiler import Compiler

    original = Compiler.__dict__["set_num_threads"]
    one, other = made(path).batches(), made(path, seed=6).batches()
    next(one), next(other)
    one.close()
    assert Compiler.__dict__["set_num_threads"] is not original
    other.close()
    assert Compiler.__dict__["set_num_threads"] is original


FRESH = """
import sys, numpy as np, torch
from pathlib import Path
torch.set_num_threads(2)
from privimage.data import store
from privimage.data.stream import PublicStream
path = Path(sys.argv[1])
if sys.argv[2] == "stream":
    next(PublicStream(path, np.arange(9), np.zeros(9), 3, 0, 1, torch.device("cpu"), 0, 0).batches())
else:
    store.labels(path)
print(torch.get_num_threads(), "ffcv" in sys.modules)
"""


@pytest.mark.parametrize("by", ["stream", "store"])
def test_a_process_that_meets_ffcv_for_the_first_time_keeps_its_threads(path: Path, by: str) -> None:
    """FFCV sets torch's threads to one when it is imported, for whatever comes later in the process."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(path), by], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["2", str(path.suffix == ".beton")], done.stderr


def test_a_stream_that_is_left_leaves_no_thread_behind(path: Path) -> None:
    before = set(threading.enumerate())
    batches = made(path).batches()
    next(batches)
    started = set(threading.enumerate()) - before
    batches.close()
    for thread in started:
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.mark.parametrize("path", [".beton"], indirect=True)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_loader_that_dies_ends_the_training_instead_of_hanging_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffcv.loader.epoch_iterator import EpochIterator

    whole = EpochIterator.run_pipeline

    def dying(self: EpochIterator, batch: int, *rest) -> tuple:
        if batch == 2:
            raise ValueError("broken")
        return whole(self, batch, *rest)

    monkeypatch.setattr(EpochIterator, "run_pipeline", dying)
    batches = made(path).batches()
    next(batches), next(batches)
    with pytest.raises(RuntimeError, match="stopped early"):
        next(batches)


@pytest.mark.parametrize("wrong", [np.array([], int), np.array([3, COUNT]), np.array([-1, 3])])
def test_images_that_the_store_does_not_hold_are_refused(path: Path, wrong: np.ndarray) -> None:
    """FFCV would read whatever is in memory there."""
    with pytest.raises(UserError, match=f"holds {COUNT} images"):
        made(path, indices=wrong, labels=np.zeros(len(wrong), int))


def test_a_damaged_store_is_refused_before_the_first_batch(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes()[:-20_000] if path.suffix == ".beton" else path.read_bytes()[:-20])
    copy.with_name(f"{path.name}.json").write_bytes(path.with_name(f"{path.name}.json").read_bytes())
    with pytest.raises(UserError, match="truncated"):
        made(copy)
