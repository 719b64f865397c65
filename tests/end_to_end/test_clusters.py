"""The whole pipeline on a public set without labels: clusters of printed characters replace classes."""

import numpy as np
import pytest
from ranks import TINY, privimage

from privimage.config import Config, load
from privimage.privacy.ledger import Ledger
from privimage.storage.files import read_json

SETTINGS = (
    "data.public.labelled=false",
    "query.semantics=clusters",
    "query.clusters=25",
    "select.per_image=2",
    "select.per_class=2",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run on handwritten digits with unlabelled glyphs."""
    settings = [f"run.dir={tmp_path_factory.mktemp('clusters') / 'run'}", *SETTINGS]
    ended = privimage("run", TINY, *settings)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return load(TINY, settings)


def test_two_clusters_serve_each_digit_and_their_images_are_pretrained_on(finished: Config) -> None:
    with (
        np.load(finished.run.dir / "select" / "selection.npz") as file,
        np.load(finished.run.dir / "query" / "clusters.npz") as query,
    ):
        assert file["counts"].shape == (10, 25)
        assert np.bincount(file["assignment"][file["assignment"] >= 0], minlength=10).tolist() == [2] * 10
        chosen = int((file["assignment"][query["clusters"]] >= 0).sum())
    record = read_json(finished.run.dir / "pretrain" / "done.json")
    assert (record["selected"], record["n_classes"]) == (chosen, 10)


def test_the_query_is_charged_once_with_the_sensitivity_of_two_votes(finished: Config) -> None:
    said = read_json(finished.run.dir / "release" / "PRIVACY.json")
    query = next(m for m in said["mechanisms"] if m["name"] == "semantic distribution query")
    assert (query["count"], query["votes_per_image"]) == (1, 2)
    assert 9.5 < said["epsilon"] <= 10
    kept = read_json(finished.run.dir / "private" / "account.json")
    ledger = Ledger(finished.run.dir.parent / "ledgers", kept["fingerprint"])
    charged = [charge.mechanism for charge in ledger.spent.charges.values() if charge.part == "select"]
    assert [m.noise_multiplier for m in charged] == [
        one["noise_multiplier"] for one in kept["plan"]["mechanisms"] if one["stage"] == "select"
    ]


def test_the_report_speaks_of_clusters(finished: Config) -> None:
    report = read_json(finished.run.dir / "evaluate" / "report.json")
    assert report["selection"]["semantics"] == "clusters"
    assert len(report["selection"]["kept"][3]["public"]) == 2
    assert all(name.startswith("cluster ") for row in report["selection"]["kept"] for name in row["public"])
    assert (
        "chose the clusters that resemble them" in (finished.run.dir / "evaluate" / "report.html").read_text()
    )
    assert report["semantics"]["sds"] is None
