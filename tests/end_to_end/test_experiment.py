"""An experiment from its file to its table, on real images: two runs that finish and one that fails."""

import csv
import subprocess
from pathlib import Path

import pytest
from ranks import TINY, privimage

from privimage.evaluation.report import NUMBERS
from privimage.storage.files import read_json

TEXT = """
title: Tiny
base: {base}
runs: {runs}
settings:
  [method=pdp-diffusion, pretrain.steps=6, finetune.steps=3, evaluate.before=true,
   "evaluate.classifiers=[lr,mlp]", privacy.accountant=pld]
axes:
  epsilon:
    10: [privacy.epsilon=10]
    1: [privacy.epsilon=1]
    lost: [data.sensitive.kind=npz, data.sensitive.path={runs}/nowhere.npz]
measures:
  LR: {{key: accuracy.lr, best: highest, unit: "%"}}
  FD: {{key: fidelity.distance, best: lowest, digits: 3}}
  spent: {{key: privacy.epsilon, digits: 4}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess]:
    """The experiment's file, the folder of its runs, and how the command ended."""
    folder = tmp_path_factory.mktemp("experiment")
    path = folder / "tiny.yaml"
    path.write_text(TEXT.format(base=TINY, runs=folder / "runs"))
    return path, folder / "runs", privimage("experiment", path)


def test_a_failed_run_is_told_at_the_end_and_the_status_is_1(made: tuple) -> None:
    _, runs, ended = made
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "2 of 3 runs are finished" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"  lost-seed0: failed: {runs}/nowhere.npz: ")


def test_the_table_has_the_numbers_of_the_reports_and_the_reason_of_the_gap(made: tuple) -> None:
    path, runs, _ = made
    shown = privimage("table", path)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout == (runs / f"{path.stem}.md").read_text()
    assert "2 of 3 runs, one seed" in shown.stdout
    assert f"- lost-seed0: failed: {runs}/nowhere.npz: " in shown.stdout
    assert "| lost | failed | failed | failed |" in shown.stdout
    with open(runs / f"{path.stem}.csv") as file:
        lines = {(line["epsilon"], line["measure"]): line for line in csv.DictReader(file)}
    for epsilon in ("10", "1"):
        report = read_json(runs / f"epsilon{epsilon}-seed0" / "evaluate" / "report.json")
        assert float(lines[epsilon, "LR"]["mean"]) == report["accuracy"]["lr"]
        assert float(lines[epsilon, "FD"]["mean"]) == report["fidelity"]["distance"]
        assert float(lines[epsilon, "spent"]["mean"]) == report["privacy"]["epsilon"] <= float(epsilon)
        assert f"| {epsilon} |" in shown.stdout
        assert f"{report['fidelity']['distance']:.3f}" in shown.stdout
    assert (lines["lost", "LR"]["mean"], lines["lost", "LR"]["finished"], lines["lost", "LR"]["planned"]) == (
        "",
        "0",
        "1",
    )


def test_pretraining_on_all_public_images_was_done_once(made: tuple) -> None:
    _, runs, _ = made
    shared = sorted(path.name.split("-")[0] for path in (runs / "shared").iterdir())
    assert shared == ["prepare", "pretrain"]
    weights = [
        (runs / f"epsilon{epsilon}-seed0" / "pretrain" / "weights.pt").read_bytes() for epsilon in (10, 1)
    ]
    assert weights[0] == weights[1]
    tuned = [
        (runs / f"epsilon{epsilon}-seed0" / "finetune" / "weights.pt").read_bytes() for epsilon in (10, 1)
    ]
    assert tuned[0] != tuned[1]


def test_finished_runs_are_skipped(made: tuple) -> None:
    path, runs, _ = made
    before = (runs / "epsilon1-seed0" / "release" / "synthetic.npz").stat().st_mtime_ns
    again = privimage("experiment", path)
    assert again.returncode == 1
    assert again.stderr.count("-seed0: done before") == 2
    assert (runs / "epsilon1-seed0" / "release" / "synthetic.npz").stat().st_mtime_ns == before


def test_a_real_report_has_every_number_that_can_be_tabulated(made: tuple) -> None:
    """Sections of methods and stages that this run has not are null, or missing as a whole."""
    report = read_json(made[1] / "epsilon10-seed0" / "evaluate" / "report.json")
    for key in NUMBERS:
        tree = report
        for part in key.split("."):
            if tree is None or (tree is report["resources"] and part not in tree):
                break
            assert part in tree, key
            tree = tree[part]
        else:
            assert tree is None or isinstance(tree, int | float), key


def test_a_generator_that_knows_public_classes_only_is_compared_by_its_images_alone(made: tuple) -> None:
    """Before fine-tuning its images have no sensitive labels to train a classifier with."""
    report = read_json(made[1] / "epsilon10-seed0" / "evaluate" / "report.json")
    assert report["fidelity_before"]["distance"] > 0
    assert report["accuracy_before"] is None


def test_a_mistake_in_the_file_is_one_line_with_status_2(made: tuple, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(made[0].read_text().replace("finetune.steps=3", "finetune.step=3"))
    for command in ("experiment", "table"):
        ended = privimage(command, wrong)
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert f"{wrong}: epsilon10-seed0: " in ended.stderr
        assert "finetune.step: unknown setting (did you mean 'steps'?)" in ended.stderr
