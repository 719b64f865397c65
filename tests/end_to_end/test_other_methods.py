"""DP-MERF and Private Evolution through the whole pipeline, as a user types it.

What leaves, what is said, and what is refused.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import TINY, privimage

from privimage.config import load
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.families import family
from privimage.models.biggan import Generator
from privimage.models.edm import to_uint8
from privimage.privacy.ledger import read
from privimage.storage.files import read_json

MECHANISMS = {"dp-merf": ("noisy mean embedding", 1), "private-evolution": ("nearest-neighbour histogram", 3)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each method, with keys from the operating system and one ledger.

    `before` asks for what there is not.
    """
    folder = tmp_path_factory.mktemp("runs")
    for method in MECHANISMS:
        ended = privimage(
            "run", str(TINY), f"method={method}", f"run.dir={folder / method}", "evaluate.before=true"
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def synthetic(run: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(run / "release" / "synthetic.npz") as released:
        return released["images"], released["labels"]


MODEL = ["config.json", "model.pt", "model.safetensors"]


@pytest.mark.parametrize(("method", "model"), [("dp-merf", MODEL), ("private-evolution", [])])
def test_the_release_is_the_allow_list_and_a_model_only_where_one_was_trained(
    runs: Path, method: str, model: list[str]
) -> None:
    assert sorted(path.name for path in (runs / method / "release").iterdir()) == [
        "PRIVACY.json",
        "PRIVACY.md",
        "README.md",
        *model,
        "samples.png",
        "synthetic.npz",
    ]
    images, labels = synthetic(runs / method)
    assert (images.dtype, images.shape) == (np.uint8, (40, 8, 8, 1))
    assert labels.tolist() == [number % 10 for number in range(40)]


@pytest.mark.parametrize("method", list(MECHANISMS))
def test_the_statement_names_the_mechanism_and_is_that_of_the_ledger(runs: Path, method: str) -> None:
    said, (name, count) = read_json(runs / method / "release" / "PRIVACY.json"), MECHANISMS[method]
    assert said["private"] and said["method"] == method and 9.9 < said["epsilon"] <= 10
    assert [
        (used["name"], used["mechanism"], used["sample_rate"], used["count"]) for used in said["mechanisms"]
    ] == [(name, "Gaussian", 1.0, count)]
    account = read_json(runs / method / "private" / "account.json")
    (charged,) = read(Path(account["ledger"]["path"])).mechanisms(account["run"])
    assert (charged.noise_multiplier, charged.count) == (said["mechanisms"][0]["noise_multiplier"], count)
    assert f"- {name}: Gaussian, noise multiplier" in (runs / method / "release" / "PRIVACY.md").read_text()


@pytest.mark.parametrize("method", list(MECHANISMS))
def test_the_key_is_destroyed_and_private_is_closed(runs: Path, method: str) -> None:
    private = runs / method / "private"
    assert private.stat().st_mode & 0o777 == 0o700 and not (private / "root.key").exists()


@pytest.mark.parametrize(("method", "stage"), [("dp-merf", "match"), ("private-evolution", "evolve")])
def test_the_report_tells_what_the_stage_took_and_how_the_privacy_was_spent(
    runs: Path, method: str, stage: str
) -> None:
    report = read_json(runs / method / "evaluate" / "report.json")
    assert (
        report["resources"][stage]["seconds"] > 0
        and report["accuracy"]["lr"] is not None
        and report["accuracy_before"] is None
    )
    assert (
        report["parameters"]
        == family(load(TINY, [f"method={method}"])).sizes(load(TINY, [f"method={method}"]), 10)["generator"]
    )
    assert MECHANISMS[method][0] in (runs / method / "evaluate" / "report.html").read_text()
    assert privimage("report", str(runs / method)).returncode == 0


def test_privacy_of_a_run_and_of_all_runs(runs: Path) -> None:
    shown = privimage("privacy", str(runs / "private-evolution"))
    assert shown.returncode == 0 and "all runs on its sensitive set" in shown.stdout
    rows = [line.split("│")[-2].strip() for line in shown.stdout.splitlines() if "│ Gaussian" in line]
    assert sorted(rows) == ["1", "3", "3"]  # of the run; of both runs


def test_the_released_model_makes_the_released_images(runs: Path) -> None:
    model = torch.load(runs / "dp-merf" / "release" / "model.pt", weights_only=True)
    generator = Generator(
        model["resolution"], model["channels"], model["n_classes"], model["model"]["gan_width"]
    )
    generator.load_state_dict(model["weights"])
    images, labels = synthetic(runs / "dp-merf")
    first = torch.arange(16)  # a block of the tiny configuration
    seed = public_seed(load(TINY, ["method=dp-merf"]), "latents")
    latents = ImageDraws(torch.device("cpu")).normal(seed, first, generator.latent_size)
    with torch.no_grad():
        made = to_uint8(generator.eval()(latents, torch.from_numpy(labels[:16])))
    assert np.array_equal(made.permute(0, 2, 3, 1).numpy(), images[:16])


@pytest.mark.parametrize("method", list(MECHANISMS))
def test_running_again_does_nothing(runs: Path, method: str) -> None:
    before = (runs / method / "release" / "synthetic.npz").stat().st_mtime_ns
    ended = privimage(
        "run", str(TINY), f"method={method}", f"run.dir={runs / method}", "evaluate.before=true"
    )
    assert ended.returncode == 0 and "synthesize: done before" in ended.stderr
    assert (runs / method / "release" / "synthetic.npz").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("method", "stage", "left"),
    [("dp-merf", "match", "weights.pt"), ("private-evolution", "evolve", "weights.pt")],
)
def test_what_was_never_charged_is_not_released(
    runs: Path, method: str, stage: str, left: str, tmp_path: Path
) -> None:
    """A finished stage put beside a new ledger."""
    import shutil

    run = tmp_path / "run"
    for name in ("prepare", "query", "pretrain", stage):
        if (runs / method / name).exists():
            shutil.copytree(runs / method / name, run / name)
    ended = privimage("synthesize", str(TINY), f"method={method}", f"run.dir={run}")
    assert (
        ended.returncode == 2
        and f"uses of the {MECHANISMS[method][0]} that made these weights are not in the ledger"
        in ended.stderr
    )
    assert not list((run / "release").glob("*.npz")) if (run / "release").exists() else True


@pytest.mark.parametrize("method", list(MECHANISMS))
def test_the_plan_names_the_mechanism_and_the_stage(method: str) -> None:
    shown = privimage("plan", str(TINY), f"method={method}")
    assert shown.returncode == 0, shown.stderr
    assert " ".join(MECHANISMS[method][0].split()[:1]) in shown.stdout
    assert {"dp-merf": "match", "private-evolution": "evolve"}[
        method
    ] in shown.stdout and "discriminator" not in shown.stdout


def test_a_fixed_key_is_called_not_private(tmp_path: Path) -> None:
    for stage in ("match", "synthesize"):
        ended = privimage(
            stage,
            str(TINY),
            "method=dp-merf",
            "match.steps=1",
            f"run.dir={tmp_path / 'run'}",
            "privacy.insecure_fixed_key=3",
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
    said = json.loads((tmp_path / "run" / "release" / "PRIVACY.json").read_text())
    assert said["private"] is False and said["epsilon"] is None


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("method=dp-merf", "data.resolution=9"), "data.resolution: the GAN doubles a map of 4x4 to 7x7"),
        (("method=dp-merf", "match.features=7"), "match.features: input should be a multiple of 2, not 7"),
        (("method=dp-merf", "match.bandwidth=0"), "match.bandwidth: input should be greater than 0, not 0"),
        (
            ("method=private-evolution", "evolve.population=0"),
            "evolve.population: input should be greater than or equal to 1, not 0",
        ),
        (
            ("method=private-evolution", "evolve.last_degree=90"),
            "evolve.last_degree: input should be less than 80, not 90",
        ),
        (
            ("method=private-evolution", "evolve.first_degree=0.3"),
            "evolve: last_degree 0.5 is more than first_degree 0.3",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line_before_anything_is_drawn(
    settings: tuple[str, ...], told: str, tmp_path: Path
) -> None:
    ended = privimage("run", str(TINY), *settings, f"run.dir={tmp_path / 'run'}")
    assert ended.returncode == 2 and told in ended.stderr
    assert len([line for line in ended.stderr.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "ledgers").exists()


def test_evolution_needs_the_public_stages(tmp_path: Path) -> None:
    ended = privimage("evolve", str(TINY), "method=private-evolution", f"run.dir={tmp_path / 'run'}")
    assert (
        ended.returncode == 2
        and "stage pretrain is not finished; run `privimage pretrain` first" in ended.stderr
    )


def test_the_stages_of_other_methods_are_refused(tmp_path: Path) -> None:
    for method, stage in (("dp-merf", "finetune"), ("privimage+d", "match"), ("pdp-diffusion", "evolve")):
        ended = privimage(stage, str(TINY), f"method={method}", f"run.dir={tmp_path / 'run'}")
        assert ended.returncode == 2 and f"{method} has no stage {stage}" in ended.stderr
