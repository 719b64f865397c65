"""A GAN through the whole pipeline on real images, small.

What leaves, and what other methods make of the same networks.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import TINY, privimage

from privimage.config import load
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.distributed import checkpoint
from privimage.models.biggan import Generator
from privimage.models.edm import to_uint8


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of PrivImage+G with a key from the operating system.

    The generator before fine-tuning is measured too.
    """
    folder = tmp_path_factory.mktemp("gan") / "run"
    ended = privimage("run", str(TINY), "method=privimage+g", f"run.dir={folder}", "evaluate.before=true")
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def test_the_release_promises_and_describes_the_private_steps_of_the_discriminator(run: Path) -> None:
    said = json.loads((run / "release" / "PRIVACY.json").read_text())
    assert said["private"] and said["method"] == "privimage+g" and 9.9 < said["epsilon"] <= 10
    steps = {used["name"]: used for used in said["mechanisms"]}["DP-SGD fine-tuning"]
    assert (steps["count"], steps["max_grad_norm"], steps["noise_copies"]) == (8, 1.0, 1)
    assert sorted(path.name for path in (run / "release").iterdir()) == [
        "PRIVACY.json",
        "PRIVACY.md",
        "README.md",
        "config.json",
        "model.pt",
        "model.safetensors",
        "samples.png",
        "synthetic.npz",
    ]


def test_the_released_model_makes_the_released_images(run: Path) -> None:
    model = torch.load(run / "release" / "model.pt", weights_only=True)
    assert model["generator"] == "gan"
    generator = Generator(
        model["resolution"], model["channels"], model["n_classes"], model["model"]["gan_width"]
    )
    generator.load_state_dict(model["weights"])
    with np.load(run / "release" / "synthetic.npz") as released:
        images, labels = released["images"], released["labels"]
    first = torch.arange(16)  # a block of the tiny configuration
    seed = public_seed(load(run / "config.yaml"), "latents")
    latents = ImageDraws(torch.device("cpu")).normal(seed, first, generator.latent_size)
    with torch.no_grad():
        made = to_uint8(generator.eval()(latents, torch.from_numpy(labels[:16])))
    assert np.array_equal(made.permute(0, 2, 3, 1).numpy(), images[:16])
    assert labels.tolist() == [number % 10 for number in range(40)]


def test_the_report_counts_the_generator_and_compares_with_the_pretrained_one(run: Path) -> None:
    report = json.loads((run / "evaluate" / "report.json").read_text())
    model = torch.load(run / "release" / "model.pt", weights_only=True)
    weights = Generator(8, 1, 10, 16)
    weights.load_state_dict(model["weights"])
    assert report["parameters"] == sum(p.numel() for p in weights.parameters())
    assert report["accuracy_before"] is not None and (run / "synthesize" / "before.npz").exists()


@pytest.mark.parametrize(
    ("method", "private", "stages"),
    [("dpgan", True, "finetune synthesize"), ("dpgan-p", True, "prepare pretrain finetune synthesize")],
)
def test_the_other_private_methods_run(method: str, private: bool, stages: str, tmp_path: Path) -> None:
    for stage in stages.split():
        ended = privimage(
            stage,
            str(TINY),
            f"method={method}",
            f"run.dir={tmp_path / 'run'}",
            "pretrain.steps=4",
            "finetune.steps=3",
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads((tmp_path / "run" / "release" / "PRIVACY.json").read_text())
    assert said["private"] is private and len(said["mechanisms"]) == 1


def test_the_same_without_noise_is_called_not_private(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for stage in ("prepare", "query"):
        shutil.copytree(run / stage, folder / stage)
    for stage in ("select", "pretrain", "finetune", "synthesize"):
        ended = privimage(stage, str(TINY), "method=nonprivg", f"run.dir={folder}", "pretrain.steps=4")
        assert ended.returncode == 0, ended.stderr[-3000:]
    assert (folder / "release" / "PRIVACY.md").read_text().startswith("# Not private")


def test_the_wrong_engine_and_the_weights_of_another_network_are_told_in_one_line(
    run: Path, tmp_path: Path
) -> None:
    folder, told = tmp_path / "run", []
    for stage in ("prepare", "pretrain"):
        shutil.copytree(run / stage, folder / stage)
    state = checkpoint.load(folder / "pretrain" / "weights.pt")
    assert state
    state["discriminator"].pop("output.bias")
    checkpoint.save(folder / "pretrain" / "weights.pt", state)
    for stage, engine in (("finetune", "ddp"), ("pretrain", "deepspeed")):
        if stage == "pretrain":
            shutil.rmtree(folder / "pretrain")
        ended = privimage(
            stage, str(TINY), "method=dpgan-p", f"run.dir={folder}", f"pretrain.engine={engine}"
        )
        assert ended.returncode == 2
        told.append(ended.stderr.strip().splitlines()[-1])
    assert told == [
        f"privimage: error: {folder / 'pretrain' / 'weights.pt'}: the weights are those of another network",
        "privimage: error: pretrain.engine: deepspeed trains one network and a GAN has two; choose ddp",
    ]
