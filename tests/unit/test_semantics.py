"""Semantics by clusters.

Views, votes for the nearest centroids and their sensitivity, unlabelled public sets, resuming.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import numbered, save_folder, save_npz, source_of
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import TINY

from privimage.config import Config, load
from privimage.data import beton, store
from privimage.data.transforms import Form
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.models.resnet import classifier
from privimage.models.semantic import TEMPERATURE, SemanticQuery, centroids_of, contrastive_loss, varied
from privimage.privacy.mechanisms.histogram import ONE, vote_counts
from privimage.stages import prepare, pretrain, query, select
from privimage.stages.public_set import load_scores, pretraining_set, public_labels, public_semantics
from privimage.storage.rundir import RunDir

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
CLUSTERS = ("query.semantics=clusters", "query.clusters=20")


def config(tmp_path: Path, *overrides: str, name: str = "run") -> Config:
    return load(TINY, [f"run.dir={tmp_path / name}", "data.public.images_per_class=10", *overrides])


def prepared(settings: Config) -> RunDir:
    run = RunDir(settings.run.dir)
    run.finish("prepare", prepare.run(settings, run, ALONE))
    return run


def queried(settings: Config) -> RunDir:
    run = prepared(settings)
    run.finish("query", query.run(settings, run, ALONE))
    return run


@pytest.fixture(scope="module")
def clustered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunDir]:
    """Glyphs without labels, in 20 clusters."""
    settings = config(tmp_path_factory.mktemp("clustered"), *CLUSTERS, "data.public.labelled=false")
    return settings, queried(settings)


def ramp(count: int, channels: int = 1) -> torch.Tensor:
    """Images that grow brighter from left to right."""
    return torch.linspace(-1, 1, 8).expand(count, channels, 8, 8).clone()


def test_views_differ_and_come_from_the_generator_alone() -> None:
    images = torch.rand(6, 3, 8, 8) * 2 - 1
    first, again, other = (varied(images, True, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert (first - other).abs().flatten(1).amax(1).min() > 0.01
    assert first.shape == images.shape and first.isfinite().all()


def test_characters_are_not_mirrored_unless_flips_are_wanted() -> None:
    generator = torch.Generator().manual_seed(0)
    rises = [varied(ramp(200), flip, generator).diff(dim=3).flatten(1) for flip in (False, True)]
    assert (rises[0] > -1e-6).all()
    mirrored = (rises[1] < 1e-6).all(1).float().mean()
    assert 0.35 < mirrored < 0.65  # half of 200; five standard deviations are 0.18


def test_a_view_shows_between_30_and_100_percent_of_the_area() -> None:
    """The ramp of a crop is flatter by the share of the side that is shown.

    Brightness and contrast (0.6 to 1.4) change its scale too.
    """
    shown = (
        varied(ramp(500), False, torch.Generator().manual_seed(3)).diff(dim=3).mean((1, 2, 3))
        / ramp(1).diff(dim=3).mean()
    )
    assert shown.min() > 0.6 * np.sqrt(0.3) * 0.9 and shown.max() < 1.4 * 1.01
    assert shown.min() < 0.5 and shown.max() > 1.1


def test_the_contrastive_loss_is_that_of_its_definition() -> None:
    torch.manual_seed(0)
    rows = torch.randn(8, 5)
    unit = rows / rows.norm(dim=1, keepdim=True)
    terms = []
    for i in range(8):
        others = [float(torch.exp(unit[i] @ unit[k] / TEMPERATURE)) for k in range(8) if k != i]
        terms.append(-np.log(float(torch.exp(unit[i] @ unit[(i + 4) % 8] / TEMPERATURE)) / sum(others)))
    assert float(contrastive_loss(rows)) == pytest.approx(np.mean(terms), rel=1e-5)
    alike = torch.cat([rows[:4], rows[:4]])
    assert contrastive_loss(alike) < contrastive_loss(rows)


def small_query(centroids: int, seed: int) -> SemanticQuery:
    torch.manual_seed(seed)
    network = classifier("resnet-small", 1, 4)
    return SemanticQuery(network, torch.randn(centroids, 192)).eval()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 4), st.integers(0, 2**31))
def test_an_image_casts_exactly_k1_different_votes_and_moves_the_histogram_by_sqrt_k1(
    count: int, k1: int, spare: int, seed: int
) -> None:
    """Also where centroids coincide, and for images that are all alike."""
    rng = np.random.default_rng(seed)
    scores = small_query(k1 + spare, seed % 1000)
    if seed % 2:
        scores.centroids = scores.centroids[:1].expand(k1 + spare, -1)
    images = rng.integers(0, 256, (count + 1, 1, 8, 8), dtype=np.uint8)
    if seed % 3 == 0:
        images[:] = images[0]
    votes, labels = select.top_votes(scores, images, k1, ALONE), rng.integers(0, 3, count + 1)
    assert votes.shape == (count + 1, k1)
    assert all(len(set(row)) == k1 for row in votes.tolist())
    assert votes.min() >= 0 and votes.max() < k1 + spare
    without = select.top_votes(scores, images[1:], k1, ALONE)
    own, shape = np.arange(count + 1), (3, k1 + spare)
    difference = vote_counts(votes, labels, own, shape, k1) - vote_counts(
        without, labels[1:], own[1:], shape, k1
    )
    difference = difference / ONE
    assert np.linalg.norm(difference) == pytest.approx(np.sqrt(k1))
    assert np.count_nonzero(difference.any(1)) == 1


def test_votes_are_for_the_nearest_centroids() -> None:
    scores = small_query(30, 5)
    images = np.random.default_rng(5).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    with torch.no_grad():
        features = scores.network.features(torch.from_numpy(images).float() / 127.5 - 1).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)  # clusters are of directions
    distances = np.linalg.norm(features[:, None] - scores.centroids.numpy()[None], axis=2)
    votes = select.top_votes(scores, images, 3, ALONE)
    assert np.allclose(np.take_along_axis(distances, votes, 1), np.sort(distances, 1)[:, :3], atol=1e-5)


def test_the_votes_of_an_image_depend_on_no_other_image() -> None:
    """A batch of one thousand, its halves, and another order."""
    scores = small_query(30, 6)
    images = np.random.default_rng(6).integers(0, 256, (1000, 1, 8, 8), dtype=np.uint8)
    votes = select.top_votes(scores, images, 2, ALONE)
    order = np.random.default_rng(7).permutation(1000)
    for part in (np.arange(500), np.arange(500, 1000), order):
        again = select.top_votes(scores, images[part], 2, ALONE)
        assert (
            again == votes[part]
        ).mean() > 0.999  # sums of another batch may be rounded otherwise: near ties


def test_k_means_finds_what_lies_apart() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 10)).astype(np.float32)
    features = np.repeat(centres, 30, 0) + rng.normal(0, 0.01, (180, 10)).astype(np.float32)
    found = centroids_of(features, 6, seed=0)
    assert found.dtype == np.float32
    nearest = np.linalg.norm(found[:, None] - centres[None], axis=2)
    assert sorted(nearest.argmin(1)) == list(range(6)) and nearest.min(1).max() < 0.02


def test_an_unlabelled_public_set_is_clustered_by_a_network_that_learnt_without_labels(
    clustered: tuple[Config, RunDir],
) -> None:
    settings, run = clustered
    assert run.require("prepare")["classes"] == ["all"]
    assert not store.labels(run.public_store).any()
    semantics = public_semantics(settings, run, ALONE)
    assert semantics.names == tuple(f"cluster {i}" for i in range(20))
    assert len(semantics.of_images) == 480
    assert len(set(semantics.of_images.tolist())) > 15
    record = run.require("query")
    assert record["validation_accuracy"] > 3 * 100 / 24  # a guess finds one of 24 held-out images
    images = store.read(run.public_store, np.arange(480))
    assert np.array_equal(
        select.top_votes(load_scores(settings, run, ALONE), images, 1, ALONE)[:, 0], semantics.of_images
    )


def test_clusters_of_a_labelled_set_are_named_by_their_most_frequent_labels(tmp_path: Path) -> None:
    settings = config(tmp_path, *CLUSTERS)
    run = queried(settings)
    semantics, labels = public_semantics(settings, run, ALONE), public_labels(run)
    assert semantics.kind == "clusters"
    for number in (0, 7, 19):
        held = np.bincount(labels.of_images[semantics.of_images == number], minlength=len(labels.names))
        best = [labels.names[i] for i in np.argsort(-held, kind="stable")[:2] if held[i]]
        assert semantics.names[number] == f"cluster {number} ({'/'.join(best)})"


def test_pretraining_takes_the_images_of_the_kept_clusters(clustered: tuple[Config, RunDir]) -> None:
    settings, run = clustered
    assignment = np.full(20, -1)
    assignment[[3, 8, 11]] = [2, 0, 2]
    run.stage("select")
    np.savez(run.stage("select") / "selection.npz", counts=np.zeros((10, 20)), assignment=assignment)
    run.finish("select", {"images": 1})
    indices, labels, n_classes = pretraining_set(settings, run, ALONE)
    clusters = public_semantics(settings, run, ALONE).of_images
    assert n_classes == 10
    assert indices.tolist() == np.flatnonzero(np.isin(clusters, [3, 8, 11])).tolist()
    assert labels.tolist() == [{3: 2, 8: 0, 11: 2}[c] for c in clusters[indices]]


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_images_without_any_labels_can_be_the_public_set(tmp_path: Path, kind: str) -> None:
    images = numbered(60)
    if kind == "npz":
        path = tmp_path / "plain.npz"
        np.savez(path, images=images)
    else:
        path = save_folder(tmp_path / "plain", images, np.zeros(60, int)) / "class0"
    overrides = (f"data.public.kind={kind}", f"data.public.path={path}")
    with pytest.raises(UserError, match="read with labelled: false"):
        prepared(config(tmp_path, *overrides, name="refused"))
    run = queried(
        config(
            tmp_path, *overrides, "data.public.labelled=false", "query.semantics=clusters", "query.clusters=5"
        )
    )
    assert run.require("query")["clusters"] == [f"cluster {i}" for i in range(5)]


def test_labels_that_are_there_are_not_looked_at(tmp_path: Path) -> None:
    path = save_npz(tmp_path / "set.npz", numbered(40), np.arange(40) % 4)
    settings = config(
        tmp_path, "data.public.kind=npz", f"data.public.path={path}", "data.public.labelled=false", *CLUSTERS
    )
    run = prepared(settings)
    assert public_labels(run).names == ("all",)
    assert not public_labels(run).of_images.any()


def test_a_given_beton_with_labels_may_be_taken_for_unlabelled(tmp_path: Path) -> None:
    if missing := beton.ffcv_missing():
        pytest.skip(missing)
    store.write(source_of(numbered(40), np.arange(40) % 4), tmp_path / "given.beton", Form(8, 1), 0)
    run = prepared(
        config(
            tmp_path,
            "data.public.kind=beton",
            f"data.public.path={tmp_path / 'given.beton'}",
            "data.public.labelled=false",
            *CLUSTERS,
        )
    )
    assert store.labels(run.public_store).any()
    assert not public_labels(run).of_images.any()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ("data.public.labelled=false",),
            (
                "query.semantics: privimage+d chooses by labels, and data.public.labelled is false; use "
                "query.semantics=clusters"
            ),
        ),
        (("data.public.labelled=false", "method=nonprivd"), "query.semantics: nonprivd chooses by labels"),
        (("data.public.labelled=false", "method=random+d"), "query.semantics: random+d chooses by labels"),
        (
            ("query.semantics=clusters", "method=random+d"),
            "query.semantics: random+d has no query, and clusters are made by one",
        ),
        (("query.semantics=cluster",), "query.semantics: input should be 'labels' or 'clusters'"),
        (
            ("query.semantics=clusters", "query.clusters=1"),
            "query.clusters: input should be greater than or equal to 2",
        ),
    ],
)
def test_a_method_that_needs_labels_says_so_in_one_line(
    tmp_path: Path, overrides: tuple[str, ...], told: str
) -> None:
    with pytest.raises(UserError) as error:
        config(tmp_path, *overrides)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_without_public_labels_all_images_are_pretrained_on_unconditionally(tmp_path: Path) -> None:
    settings = config(tmp_path, "data.public.labelled=false", "method=pdp-diffusion", "pretrain.steps=2")
    run = prepared(settings)
    indices, labels, n_classes = pretraining_set(settings, run, ALONE)
    assert (len(indices), labels.any(), n_classes) == (480, False, 0)
    assert pretrain.run(settings, run, ALONE)["n_classes"] == 0


def test_more_votes_than_clusters_are_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, *CLUSTERS)
    run = queried(settings)
    with pytest.raises(UserError, match=r"select\.per_image: 21 is more than the 20 clusters"):
        select.run(config(tmp_path, *CLUSTERS, "select.per_image=21"), run, ALONE)
    with pytest.raises(
        UserError, match=r"select\.per_class: 10 sensitive classes times 3 are more than the 20 clusters"
    ):
        select.run(config(tmp_path, *CLUSTERS, "select.per_class=3"), run, ALONE)


@pytest.mark.parametrize("moment", ["in training", "at a checkpoint", "in clustering"])
def test_a_query_that_was_stopped_ends_like_an_undisturbed_one(
    clustered: tuple[Config, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    settings = config(tmp_path, *CLUSTERS, "data.public.labelled=false")
    run = prepared(settings)
    names = {"in training": "to_unit", "at a checkpoint": "_accuracy", "in clustering": "centroids_of"}
    original, calls = getattr(query, names[moment]), []

    def asked_meanwhile(*arguments):
        calls.append(moment)
        if len(calls) == (4 if moment == "in training" else 1):
            monkeypatch.setattr(stop, "requested", True)
        return original(*arguments)

    monkeypatch.setattr(query, names[moment], asked_meanwhile)
    with pytest.raises(Stopped):
        query.run(settings, run, ALONE)
    monkeypatch.undo()
    assert not (run.path / "query" / "clusters.npz").exists()
    # an undisturbed run does not look at the network after four steps, and so cannot keep it
    assert (run.path / "query" / "network.pt").exists() == (moment != "in training")
    run.finish("query", query.run(settings, run, ALONE))
    undisturbed = clustered[1]
    weights = [_weights(folder) for folder in (run, undisturbed)]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    with (
        np.load(run.path / "query" / "clusters.npz") as own,
        np.load(undisturbed.path / "query" / "clusters.npz") as other,
    ):
        assert np.array_equal(own["clusters"], other["clusters"]) and np.array_equal(
            own["centroids"], other["centroids"]
        )


def _weights(run: RunDir) -> dict[str, torch.Tensor]:
    state = checkpoint.load(run.path / "query" / "network.pt")
    assert state is not None
    return state["network"]


def test_a_damaged_file_of_clusters_is_named(clustered: tuple[Config, RunDir], tmp_path: Path) -> None:
    settings, run = clustered
    copy = RunDir(tmp_path / "copy")
    shutil.copytree(run.path, copy.path)
    path = copy.path / "query" / "clusters.npz"
    for content in (b"", b"PK hello", path.read_bytes()[:-300]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"clusters\.npz: missing or damaged"):
            public_semantics(settings, copy, ALONE)
