"""The report says what the contract promises, marks what is sensitive, and needs nothing from elsewhere."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from privimage.config import Config
from privimage.errors import UserError
from privimage.evaluation import advice, figures, report
from privimage.evaluation.compare import compare
from privimage.privacy.accounting import SampledGaussian, best_guess
from privimage.stages.measures import MEASURES, Measure
from privimage.storage.rundir import RunDir

PROMISE = {
    "private": True,
    "epsilon": 9.98,
    "delta": 1e-4,
    "accountant": "pld",
    "neighbours": "add or remove one image",
    "promised_epsilon": 10.0,
    "best_guess": 0.8201,
    "mechanisms": [
        {"name": "DP-SGD fine-tuning", "noise_multiplier": 2.17, "sample_rate": 0.3, "count": 100}
    ],
}
FIDELITY = {
    "name": "FD-768",
    "fid": None,
    "kid": None,
    "precision": 0.5,
    "recall": 0.25,
    "samples": 40,
    "features": "768",
    "distance": 12.5,
    "kernel_name": "KD-768",
    "kernel_distance": 0.02,
    "kernel_deviation": 0.001,
    "inception_score": None,
    "inception_deviation": None,
    "reference_samples": 40,
    "weights_sha256": "ab" * 32,
    "note": "middle features",
}
MEMORY = {"nearest_is_training": 0.8, "expected": 0.8, "excess": 0.0, "identical": 0, "images": 40}
SECTIONS = {
    "How useful",
    "How alike",
    "Does it repeat sensitive images?",
}  # all that they tell was computed on sensitive images


def results(**changes: object) -> dict:
    return {
        "privacy": PROMISE,
        "accuracy": {"lr": 87.5, "mlp": 88.5, "cnn": 91.25},
        "accuracy_before": {"lr": 60.0, "mlp": 61.0, "cnn": 62.0},
        "accuracy_before_images": 20,
        "fidelity": FIDELITY,
        "fidelity_before": FIDELITY | {"distance": 30.0},
        "semantics": {"sds": 0.42, "sds_all_public": 0.3, "covered": [1.0, 0.9]},
        "memorization": MEMORY,
        "selection": {
            "images": 30,
            "public_images": 100,
            "by_vote": True,
            "semantics": "public classes",
            "kept": [{"name": "<cat>", "public": ["tabby"]}, {"name": "dog", "public": ["collie", "pug"]}],
        },
        "synthetic": {"images": 40, "resolution": 8, "channels": 1, "classes": ["<cat>", "dog"]},
        "sensitive": {"images": 300, "test_images": 50},
        "grid_classes": [0, 1],
        "parameters": 1234,
        "evaluate": {"seconds": 12.0, "peak_memory_bytes": 2**30, "images_per_second": 3.3},
        **changes,
    }


@pytest.fixture
def run(tiny_config: Config) -> RunDir:
    """A run directory with two finished stages and the figures of the page."""
    run = RunDir(tiny_config.run.dir)
    for stage in ("prepare", "finetune"):
        run.finish(
            stage,
            {"images": 100, "seconds": 90.0, "cpu_seconds": 150.0}
            | {"peak_memory_bytes": 2**28, "images_per_second": 1.1, "more": 0},
        )
    folder = run.stage("evaluate") / "figures"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    figures.sample_grid(folder / "samples.png", images, np.arange(40) % 2, 2)
    figures.nearest_pairs(folder / "sensitive-nearest.png", images, images, np.arange(40.0))
    names = report.CLASSIFIERS
    figures.accuracies(folder / "sensitive-accuracy.png", {"lr": 87.5}, {"lr": 60.0}, 50, names)
    return run


def page(run: RunDir) -> str:
    return (run.path / "evaluate" / "report.html").read_text()


def sections(text: str) -> dict[str, str]:
    found = re.findall(r"<section[^>]*>(.*?)</section>", text, re.DOTALL)
    return {match.group(1): part for part in found if (match := re.search(r"<h2>(.*?)</h2>", part))}


def test_report_json_holds_the_contract(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    told = json.loads((run.path / "evaluate" / "report.json").read_text())
    assert told["method"] == "privimage+d"
    assert [told["privacy"][key] for key in ("epsilon", "delta", "accountant")] == [9.98, 1e-4, "pld"]
    assert told["accuracy"] == {"lr": 87.5, "mlp": 88.5, "cnn": 91.25}
    assert {"fid", "kid", "precision", "recall", "samples", "features"} <= set(told["fidelity"])
    assert told["semantics"]["sds"] == 0.42
    assert set(told["resources"]) == {"prepare", "finetune", "evaluate"}
    assert told["resources"]["finetune"] == {
        "seconds": 90.0,
        "cpu_seconds": 150.0,
        "gpu_seconds": None,
        "peak_memory_bytes": 2**28,
        "images_per_second": 1.1,
    }
    assert told["parameters"] == 1234
    assert {"privimage", "python", "torch"} <= set(told["versions"])
    assert {"accuracy", "fidelity", "memorization"} <= set(told["not_covered_by_the_promise"])


def test_the_page_stands_alone(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    text = page(run)
    assert not re.findall(r"https?:|<link|<script|<iframe|@import|url\(", text)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_every_sensitive_measure_is_marked(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    text = page(run)
    parts = sections(text)
    assert set(parts) >= SECTIONS
    for name in SECTIONS:  # in the words above the numbers, not only somewhere below
        assert "not covered by the promise" in parts[name].split("</p>")[0], name
    similarity = next(
        part for part in parts["What the generator learnt from first"].split("</p>") if "similarity" in part
    )
    assert "not covered by the promise" in similarity
    pictures = re.findall(r"<figure>.*?</figure>", text, re.DOTALL)
    marked = [picture for picture in pictures if "not covered by the promise" in picture]
    assert ["Accuracy of each classifier" in picture for picture in marked] == [
        True
    ]  # the one sensitive figure among these
    assert "not covered by the promise" in re.search(r"The closest pairs:.*?</h3>", text).group()  # type: ignore[union-attr]
    tile = re.search(r'<div class="tile wide">.*?</div>', text, re.DOTALL)
    assert tile and "not covered by the promise" in tile.group()
    assert "Share the folder <code>release/</code>, not this page" in text


def test_the_released_images_are_not_marked_as_sensitive(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    part = sections(page(run))["What was made"]
    assert "not covered" not in part
    assert "covered by the promise" in part


def test_distances_of_other_features_are_not_called_fid(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    text = page(run)
    assert "FD-768" in text
    assert not re.search(r"\b[FK]ID\b", text)


def test_the_three_accuracies_stand_side_by_side(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    part = sections(page(run))["How useful"]
    for number in ("87.5 %", "88.5 %", "91.2 %", "60.0 %", "61.0 %", "62.0 %"):
        assert number in part
    assert "best of" in part  # why none of them is singled out


AGREEMENT = {"classifier": "cnn", "percent": 91.4, "images": 20, "chance": 50.0, "relabelled": 0.105}
CEILING = {
    "accuracy_ceiling": {"lr": 96.0, "mlp": 97.0, "cnn": 98.5},
    "accuracy_ceiling_images": 70,
    "accuracy_chance": 51.0,
    "classes": {
        "classifier": "cnn",
        "of": [
            {"name": "<cat>", "accuracy": 93.1, "ceiling": 99.2, "test_images": 29},
            {"name": "dog", "accuracy": None, "ceiling": None, "test_images": 0},
        ],
    },
    "agreement": AGREEMENT,
    "ledger": {"runs": 3, "not_private": 1, "epsilon": 17.25, "delta": 1e-4},
}


def test_the_ceiling_stands_beside_each_accuracy_and_class(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results(**CEILING))
    part = sections(page(run))["How useful"]
    for number in ("96.0 %", "97.0 %", "98.5 %", "93.1 %", "99.2 %", "51.0 %", "10.5 %"):
        assert number in part
    assert "Class by class" in part and "&lt;cat&gt;" in part and "dog" not in part
    told = json.loads((run.path / "evaluate" / "report.json").read_text())
    assert "70 images of the sensitive set" in part
    sensitive = {"accuracy_ceiling", "accuracy_ceiling_images", "accuracy_chance", "classes", "ledger"}
    assert sensitive <= set(told["not_covered_by_the_promise"])
    assert "agreement" not in told["not_covered_by_the_promise"]  # from the synthetic set alone
    assert 'class="warned"' not in page(run)


def test_a_result_near_chance_is_told_first_with_three_reasons(run: RunDir, tiny_config: Config) -> None:
    low = {"accuracy": {"lr": 52.0, "mlp": 55.0, "cnn": 54.0}}
    changes = CEILING | low | {"accuracy_before": {"lr": 53.0, "mlp": 56.0, "cnn": 50.0}}
    report.write(run, tiny_config, results(**changes))
    text = page(run)
    box = re.search(r'<section class="warned">(.*?)</section>', text, re.DOTALL)
    assert box and text.index(box.group()) < text.index("What was made")
    assert "The result is near chance" in box.group(1) and "55.0 %" in box.group(1)
    reasons = re.findall(r"<li>(.*?)</li>", box.group(1))
    assert len(reasons) == 3
    assert "do not resemble" in reasons[0] and "what the private classifier sees" in reasons[1]
    assert "made it worse (before: 56.0 %)" in reasons[2]


def test_a_set_of_groups_has_its_ceiling_and_its_warnings_too(run: RunDir, tiny_config: Config) -> None:
    """How many images it has is private, and not in the report."""
    groups = {"sensitive": {"images": None, "groups": 75, "test_images": 50}, "parameters": 10**9}
    low = {"accuracy": {"lr": 52.0, "mlp": 55.0, "cnn": 54.0}}
    before = CEILING | {"accuracy_ceiling_images": None}  # of a report that did not say
    report.write(run, tiny_config, results(**before | low | groups))
    assert "the images of 75 groups; as many private" in sections(page(run))["How useful"]
    assert "The noise drowns the signal" in page(run)


AS_ASKED = {"relabelled": None}  # the labels; otherwise those of a private classifier


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"parameters": 10**9}, "The noise drowns the signal"),
        ({"accuracy_ceiling": {"lr": 70.0, "mlp": 67.0, "cnn": 68.0}}, "The task is hard"),
        ({"agreement": AGREEMENT | AS_ASKED | {"percent": 55.0}}, "labels (see below): guidance"),
        ({"agreement": AGREEMENT | {"percent": 55.0}}, "labels (see below): more images"),
        ({"agreement": AGREEMENT | AS_ASKED}, "those of the public images stayed"),
        ({"agreement": AGREEMENT}, "what the private classifier sees"),
        ({"synthetic": {"images": 40, "classes": ["a", "b"]}}, "20 synthetic images of a class"),
        ({}, "finetune.steps"),
    ],
)
def test_reasons_are_those_that_the_numbers_name(changes: dict, told: str) -> None:
    quiet: dict = {
        "accuracy": {"lr": 54.0, "mlp": 52.0, "cnn": 53.0},
        "accuracy_before": None,
        "agreement": None,
        "synthetic": {"images": 4000, "classes": ["a", "b"]},
        "sensitive": {"images": 60_000, "test_images": 50},
    }
    found = advice.warnings(results(**CEILING | quiet | changes))
    assert found[0].title == "The result is near chance"
    assert told in found[0].reasons[0]


@pytest.mark.parametrize(
    ("labels", "advised"), [(AS_ASKED, "synthesize.guidance"), ({}, "synthesize.samples")]
)
def test_labels_that_do_not_fit_their_images_are_told(labels: dict, advised: str) -> None:
    for percent, wanted in ((91.4, []), (60.0, ["Labels and images disagree"])):
        agreement = AGREEMENT | labels | {"percent": percent}
        found = advice.warnings(results(**CEILING | {"agreement": agreement}))
        assert [box.title for box in found] == wanted
        assert all(advised in box.text for box in found)


def test_what_to_do_before_publishing(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results(**CEILING))
    part = sections(page(run))["Before you publish"]
    for said in ("19.96", "several images", "few images only", "chosen by results", "17.25", "without noise"):
        assert said.replace("19.96", "20") in part, said
    grouped = PROMISE | {"neighbours": "add or remove one person", "unit": "group"}
    report.write(run, tiny_config, results(**CEILING | {"privacy": grouped}))
    part = sections(page(run))["Before you publish"]
    assert "add or remove one person" in part and "several images" not in part


def test_the_cost_is_in_hours_and_an_estimate_of_energy(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    part = sections(page(run))["What it took"]
    assert "2.5 min" in part and "core hours" in part and "an estimate" in part and "GPU time" not in part
    costs = report.cost({"a": {"seconds": 7200, "cpu_seconds": 3600, "gpu_seconds": 7200}, "b": {}})
    assert costs["kwh"] == pytest.approx((10 + 2 * 500) / 1000)


def test_an_older_report_is_still_read(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    path = run.path / "evaluate" / "report.json"
    told = json.loads(path.read_text())
    assert "accuracy_ceiling" not in told  # as before there was one
    report.rebuild(run)
    assert "Class by class" not in page(run)


def test_runs_are_set_side_by_side_for_their_owner_alone(
    run: RunDir, tiny_config: Config, tmp_path: Path
) -> None:
    report.write(run, tiny_config, results(**CEILING))
    other = RunDir(tmp_path / "other <run>")
    shutil.copytree(run.path / "evaluate" / "figures", other.stage("evaluate") / "figures")
    report.write(other, tiny_config, results(accuracy={"lr": 12.5, "mlp": None, "cnn": 99.9}))
    out = tmp_path / "comparison.html"
    compare([run.path, other.path], out)
    text = out.read_text()
    assert out.stat().st_mode & 0o777 == 0o600
    assert "for the owner of the data" in text and "not covered by the promise" in text
    for said in ("other &lt;run&gt;", "<strong>99.9 %</strong>", "91.2 %", "98.5", "FD-768", "9.98"):
        assert said in text, said
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "Not the same" not in text
    changes = {"sensitive": {"images": 299, "test_images": 50}, "fidelity": FIDELITY | {"name": "FID"}}
    report.write(other, tiny_config, results(**changes))
    compare([run.path, other.path], out)
    assert "Not the same images" in out.read_text() and "Not the same distance" in out.read_text()
    with pytest.raises(UserError, match="no report"):
        compare([run.path, tmp_path / "nowhere"], out)


def test_scores_of_the_benchmark_are_in_report_and_comparison(
    run: RunDir, tiny_config: Config, tmp_path: Path
) -> None:
    report.write(run, tiny_config, results())
    older = RunDir(tmp_path / "older")  # which knows nothing of them
    shutil.copytree(run.path / "evaluate", older.stage("evaluate"), dirs_exist_ok=True)
    three = {"resnet": 71.0, "wrn": 72.5, "resnext": 76.0, "benchmark_best": 76.0, "benchmark_mean": 73.17}
    scores = {"lr": 50.0, "mlp": 51.0, "cnn": 70.0} | three
    fidelity = FIDELITY | {"name": "FID", "inception_score": 7.77, "inception_deviation": 0.1}
    report.write(run, tiny_config, results(accuracy=scores, accuracy_before=None, fidelity=fidelity))
    for said in ("ResNeXt", "73.2 %", "Best of the three", "Inception score", "7.77"):
        assert said in page(run), said
    assert "Inception score" not in page(older) and "DPImageBench" not in page(older)
    compare([run.path, older.path], tmp_path / "comparison.html")
    text = (tmp_path / "comparison.html").read_text()
    for said in ("Mean of the three", "73.2 %", "7.77"):
        assert said in text, said


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [400, 1200])
def test_names_of_classes_stand_in_line_with_their_rows(
    run: RunDir, tiny_config: Config, tmp_path: Path, width: int
) -> None:
    classes = [f"a rather long name {i}" for i in range(12)]
    images = np.zeros((192, 1, 8, 8), np.uint8)
    folder = run.path / "evaluate" / "figures"
    rows = figures.sample_grid(folder / "samples.png", images, np.arange(192) % 12, 12)
    synthetic = {"images": 192, "resolution": 8, "channels": 1, "classes": classes}
    report.write(run, tiny_config, results(synthetic=synthetic, grid_classes=rows))
    # The browser itself says how far each name is from the middle of its row, as a share of the row.
    script = """<script>onload = () => {
      const box = document.querySelector(".grid img").getBoundingClientRect(), row = box.height / 12;
      const off = [...document.querySelectorAll(".grid span")].map((span, i) => {
        const name = span.getBoundingClientRect();
        const middle = (name.top + name.bottom) / 2 - box.top - (i + .5) * row;
        return Math.max(Math.abs(middle), name.height - row) / row;
      });
      document.title = "off " + Math.max(...off) + " wide " + document.documentElement.scrollWidth;
    }</script></body>"""
    (tmp_path / "inner.html").write_text(page(run).replace("</body>", script))
    told = 'onload="document.title = contentDocument.title"'
    frame = f'<iframe src="inner.html" width="{width}" height="900" {told}>'
    (tmp_path / "page.html").write_text(frame)
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files")
    ended = subprocess.run(
        ["chromium", *flags, "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r"<title>off ([\d.]+) wide (\d+)</title>", ended.stdout)
    assert found, ended.stderr[-2000:]
    assert float(found.group(1)) < 0.25
    assert int(found.group(2)) <= width


def test_names_of_classes_cannot_inject(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    assert "<cat>" not in page(run)
    assert "&lt;cat&gt;" in page(run)


def test_a_run_without_privacy_says_so_first(run: RunDir, tiny_config: Config) -> None:
    nothing = {
        "private": False,
        "epsilon": None,
        "delta": None,
        "accountant": "pld",
        "reason": "not private: a fixed key was used",
        "mechanisms": [],
    }
    report.write(run, tiny_config, results(privacy=nothing))
    text = page(run)
    assert "synthetic images, not private</h1>" in text
    assert "a fixed key was used" in text
    assert "may be shared" not in text
    assert 'class="badge covered"' not in text


def test_classifiers_trained_on_the_sensitive_set_itself_are_the_ceiling(
    run: RunDir, tiny_config: Config
) -> None:
    nothing = {
        "private": False,
        "epsilon": None,
        "delta": None,
        "accountant": None,
        "reason": "trained on sensitive images",
        "mechanisms": [],
    }
    absent = dict.fromkeys(("name", "fid", "kid", "precision", "recall", "samples", "features"))
    without: dict = {
        "synthetic": None,
        "memorization": None,
        "selection": None,
        "accuracy_before": None,
        "fidelity_before": None,
        "grid_classes": [],
    }
    report.write(run, tiny_config, results(privacy=nothing, fidelity=absent, parameters=None, **without))
    assert "What is possible without privacy" in page(run)
    assert set(sections(page(run))) >= {"How useful", "What it took"}


def test_an_unlabelled_set_tells_why_there_is_no_accuracy(run: RunDir, tiny_config: Config) -> None:
    empty = dict.fromkeys(("lr", "mlp", "cnn"))
    changes = results(
        accuracy=empty,
        accuracy_before=None,
        accuracy_note="Not measured: the sensitive set has no classes to tell apart.",
        grid_classes=[],
    )
    report.write(run, tiny_config, changes)
    assert "no classes to tell apart" in page(run)


def test_rebuilding_needs_no_data_and_adds_what_finished_since(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    before = page(run)
    (run.path / "evaluate" / "report.html").unlink()
    report.rebuild(run)
    assert page(run) == before
    run.finish(
        "evaluate", {"images": 40, "seconds": 7200.0, "peak_memory_bytes": 2**31, "images_per_second": 0.5}
    )
    report.rebuild(run)
    assert "120.0 min" not in before
    assert "2.0 h" in page(run)


def test_rebuilding_without_a_report_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.json: no such file"):
        report.rebuild(RunDir(tmp_path / "nowhere"))


def test_the_promise_in_plain_words_is_the_accountants_number(run: RunDir, tiny_config: Config) -> None:
    report.write(run, tiny_config, results())
    assert "<strong>83 times in 100</strong>" in page(run)  # 82.01 is rounded up: it stands behind "at most"
    assert "(9.98, 1e-4)-differential privacy" in page(run)


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 5.0])
def test_the_best_guess_is_the_closed_form_of_a_gaussian(noise_multiplier: float) -> None:
    # two unit-sensitivity Gaussians differ by TV = 2 Phi(1 / (2 sigma)) - 1, and (1 + TV) / 2 = Phi(1 / (2
    # sigma))
    expected = NormalDist().cdf(1 / (2 * noise_multiplier))
    assert expected - 1e-6 <= best_guess([SampledGaussian(noise_multiplier)]) <= expected + 1e-3


def test_the_sample_grid_shows_the_pixels_unchanged(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    labels = np.array([0] * 3 + [2] * 17)
    rows = figures.sample_grid(tmp_path / "grid.png", images, labels, 3, columns=5)
    assert rows == [0, 2]
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    scale = (picture.shape[1] - 4 * 4) // (5 * 8)
    second_row = picture[8 * scale + 4 :: scale][:8, 8 * scale + 4 :: scale][:, :8]
    assert np.array_equal(second_row[..., :3], images[4].transpose(1, 2, 0))
    assert picture[0, -1, 3] == 0  # the first class has but three images: the rest of its row is transparent


@pytest.mark.parametrize(("n_classes", "labels"), [(1, 0), (100, 57)])
def test_many_classes_or_one_make_rows_of_whatever_comes(n_classes: int, labels: int, tmp_path: Path) -> None:
    images = np.zeros((30, 1, 8, 8), np.uint8)
    assert figures.sample_grid(tmp_path / "grid.png", images, np.full(30, labels), n_classes) == []
    assert Image.open(tmp_path / "grid.png").size[0] > 900


def test_each_figure_is_drawn_for_light_and_dark(tmp_path: Path) -> None:
    random, names = np.random.default_rng(0), ["automobile", "bird", "cat"]
    figures.accuracies(tmp_path / "accuracy.png", {"lr": 80.0, "cnn": 90.0}, {}, 33.3, report.CLASSIFIERS)
    figures.confusion_matrix(tmp_path / "confusion.png", random.integers(0, 50, (3, 3)), names)
    figures.embedding(
        tmp_path / "tsne.png",
        random.normal(size=(20, 4)),
        np.arange(20) % 3,
        random.normal(size=(10, 4)),
        np.arange(10) % 3,
        names,
        0,
    )
    figures.loss_curve(tmp_path / "loss.png", [10, 20, 30], [3.0, 0.5, 0.2])
    kept, columns = (
        np.where(np.arange(60) < 3, np.arange(60), -1),
        [f"cluster {i} (cat/dog)" for i in range(60)],
    )
    figures.selection(
        tmp_path / "selection.png", random.normal(10, 5, (3, 60)), kept, names, columns, "clusters"
    )
    figures.budget(tmp_path / "budget.png", [0, 50, 100], [0.1, 5.0, 9.9], 10.0)
    for name in ("accuracy", "confusion", "tsne", "loss", "selection", "budget"):
        light, dark = (
            np.asarray(Image.open(tmp_path / f"{name}{suffix}.png").convert("L")) for suffix in ("", "-dark")
        )
        assert light.shape == dark.shape
        assert light[0, 0] > 200 > 60 > dark[0, 0]
        assert light.std() > 5  # something is drawn


def test_what_nobody_has_declared_covered_is_marked(run: RunDir, tiny_config: Config) -> None:
    """A new measure or figure counts as computed on sensitive images until someone declares otherwise."""
    report.write(run, tiny_config, results(another={"value": 1.0}))
    told = json.loads((run.path / "evaluate" / "report.json").read_text())
    assert {"another", "resources.finetune"} <= set(told["not_covered_by_the_promise"])
    assert not {"privacy", "selection", "resources.prepare"} & set(told["not_covered_by_the_promise"])
    assert not report.covered("another.value") and not report.covered("privacyless")
    assert report.covered("privacy.epsilon") and report.covered("resources.pretrain.seconds")


@pytest.mark.parametrize(("name", "marked"), [("sensitive-accuracy", True), ("budget", False)])
def test_a_figure_is_marked_unless_it_is_declared_covered(
    run: RunDir, tiny_config: Config, monkeypatch: pytest.MonkeyPatch, name: str, marked: bool
) -> None:
    folder = run.path / "evaluate" / "figures"
    figures.budget(folder / "budget.png", [1, 2], [0.5, 1.0], 1.0)
    report.write(run, tiny_config, results())
    pictures = {
        alt: "not covered by the promise" in picture
        for picture in re.findall(r"<figure>.*?</figure>", page(run), re.DOTALL)
        for alt in re.findall(r'alt="([^"]*)"', picture)
    }
    alt = {"sensitive-accuracy": "Accuracy of each classifier", "budget": "Epsilon spent"}[name]
    assert [value for key, value in pictures.items() if key.startswith(alt)] == [marked]
    monkeypatch.setattr(report, "COVERED_FIGURES", ())  # a figure that nobody has declared
    report.rebuild(run)
    found = next(p for p in re.findall(r"<figure>.*?</figure>", page(run), re.DOTALL) if alt in p)
    assert "not covered by the promise" in found


def test_every_measure_declares_what_it_fills() -> None:
    """And what it does not declare is refused; figures of sensitive data carry it in their names."""
    keys = [key for measure in MEASURES for key in measure.keys]
    assert len(set(keys)) == len(keys)
    for measure in MEASURES:
        for name in measure.figures:
            assert (name in report.COVERED_FIGURES) != name.startswith("sensitive-"), name
    subject = SimpleNamespace(world=SimpleNamespace(is_main=True))
    with pytest.raises(RuntimeError, match="has filled"):
        Measure(("one",), lambda subject: {"other": 1}).results(subject)
