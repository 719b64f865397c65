"""Starters: made from public images alone, they say what made them, and runs begin with them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from ranks import TINY
from safetensors import safe_open

from privimage.commands import rehearse
from privimage.commands import starter as command
from privimage.config import Config, load
from privimage.distributed import checkpoint
from privimage.distributed.world import ALONE
from privimage.errors import UserError
from privimage.families import starter
from privimage.models import build_diffusion
from privimage.models.resnet import classifier
from privimage.runs import pipeline, sharing
from privimage.storage.rundir import RunDir

QUICK = ("pretrain.steps=6", "query.steps=6", "query.checkpoint_every=3", "evaluate.fidelity_samples=60")
SHAPE = ("data.sensitive.kind=npz", "data.sensitive.path=/nowhere/secret.npz")


def config(folder: Path, *overrides: str) -> Config:
    return load(TINY, [f"run.dir={folder / 'run'}", *QUICK, *overrides])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A starter of 8x8 characters, made where there is no sensitive set to open."""
    folder = tmp_path_factory.mktemp("made")
    settings = config(folder, *SHAPE, "data.sensitive.count=100", "data.sensitive.classes=3")
    assert command.run(settings, folder / "starter", "apache-2.0", "printed characters") == 0
    return folder / "starter"


def read(made: Path, network: starter.Network) -> starter.Starter:
    return starter.read(made, network, "key")


def test_each_file_and_the_card_state_what_the_weights_were_trained_on(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "README.md", "samples.png", "query.safetensors", "diffusion.safetensors",
    }  # fmt: skip
    for network, images in (("query", 6 * 64), ("diffusion", 6 * 32)):
        stated = read(made, network).stated
        assert stated["data"] == "printed characters" and stated["licence"] == "apache-2.0"
        assert stated["images_seen"] == images and stated["images"] == 48 * 20
        with safe_open(made / f"{network}.safetensors", "pt") as file:
            kinds = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}
        assert (made / f"{network}.safetensors").stat().st_mode & 0o777 == 0o644
    page = (made / "README.md").read_text()
    for said in (
        "license: apache-2.0",
        "printed characters: 960 images of 48",
        "384 images seen",
        "stand-in FD",
    ):
        assert said in page, said
    assert "secret" not in page and "nowhere" not in page


def test_a_starter_that_begins_with_another_counts_its_images(made: Path, tmp_path: Path) -> None:
    both = [f"{stage}.start_from={made}" for stage in ("query", "pretrain")]
    settings = config(tmp_path, *SHAPE, "data.sensitive.count=100", "data.sensitive.classes=3", *both)
    assert command.run(settings, tmp_path / "longer", "apache-2.0", "") == 0
    assert read(tmp_path / "longer", "query").stated["images_seen"] == 2 * 6 * 64
    assert read(tmp_path / "longer", "diffusion").stated["images_seen"] == 2 * 6 * 32
    page = (tmp_path / "longer" / "README.md").read_text()
    assert (
        "begun with starter, trained on printed characters (192 images seen): 384 images seen in all" in page
    )
    assert str(tmp_path) not in page and str(made.parent) not in page


def test_a_run_begins_with_the_starter_and_its_classes_with_the_mean_of_their_public_images(
    made: Path, tmp_path: Path
) -> None:
    begun = [f"query.start_from={made}", f"pretrain.start_from={made / 'diffusion.safetensors'}"]
    still = ["query.learning_rate=1e-12", "pretrain.learning_rate=1e-12", "pretrain.steps=1", "query.steps=1"]
    settings = config(tmp_path, *begun, *still, "select.per_class=2")
    assert pipeline.run(settings, ("prepare", "query", "select", "pretrain")) == 0
    run = RunDir(settings.run.dir)

    network = checkpoint.required(run.path / "query" / "network.pt", "query")["network"]
    for name, value in read(made, "query").weights.items():
        if "running" not in name and value.is_floating_point():
            assert torch.allclose(network[name], value, atol=1e-6), name

    found = checkpoint.required(run.path / "pretrain" / "weights.pt", "pretrain")
    first = read(made, "diffusion")
    for name in ("network.input.weight", "network.output.weight", "network.embed_1.bias"):
        assert torch.allclose(found["raw"][name], first.weights[name], atol=1e-6)
        assert torch.allclose(found["ema"][name], first.weights[name], atol=1e-6)
    # Classes have as many images each here, so that the mean of their embeddings is weighted evenly.
    assignment = np.load(run.path / "select" / "selection.npz")["assignment"]
    embeddings = first.weights["network.label.weight"]
    for label in range(10):
        expected = embeddings[:-1][torch.from_numpy(assignment == label)].mean(0)
        assert torch.allclose(found["raw"]["network.label.weight"][label], expected, atol=1e-6)
    assert torch.allclose(found["raw"]["network.label.weight"][10], embeddings[-1], atol=1e-6)


def denoised(model: torch.nn.Module, labels: list[int] | None) -> torch.Tensor:
    images = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(images, torch.full((3,), 0.7), None if labels is None else torch.tensor(labels))


def test_without_classes_the_network_computes_what_it_did_without_a_label(made: Path, tmp_path: Path) -> None:
    first, settings = read(made, "diffusion"), config(tmp_path)
    with_classes, without = build_diffusion(settings, 48), build_diffusion(settings, 0)
    with_classes.load_state_dict(first.weights)
    without.load_state_dict(starter.denoiser_weights(first, np.zeros((0, 48))))
    assert torch.allclose(denoised(without, None), denoised(with_classes, [48] * 3), atol=1e-6)


def test_classes_that_a_starter_does_not_know_begin_as_no_label(made: Path, tmp_path: Path) -> None:
    first, model = read(made, "diffusion"), build_diffusion(config(tmp_path), 2)
    shares = np.zeros((2, 48))
    shares[0, [3, 5]] = 30, 10
    weights = starter.denoiser_weights(first, shares)
    model.load_state_dict(weights)
    assert torch.allclose(denoised(model, [1] * 3), denoised(model, [2] * 3))
    embeddings = first.weights["network.label.weight"]
    expected = 0.75 * embeddings[3] + 0.25 * embeddings[5]
    assert torch.allclose(weights["network.label.weight"][0], expected, atol=1e-6)


def test_a_query_network_keeps_the_classes_that_it_knows_by_their_names(made: Path) -> None:
    first, fresh = read(made, "query"), classifier("resnet-small", 1, 3)
    network, whole = classifier("resnet-small", 1, 3), classifier("resnet-small", 1, 48)
    whole.load_state_dict(first.weights)
    names = [first.classes[7], "another", first.classes[2]]
    network.load_state_dict(starter.classifier_weights(first, fresh, names))
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        found, expected = network.eval()(images), whole.eval()(images)
    assert torch.allclose(found[:, [0, 2]], expected[:, [7, 2]], atol=1e-5)
    assert torch.equal(network.head.weight[1], fresh.head.weight[1])


def of_a_release(folder: Path, made: Path) -> Path:
    """The weights of a starter in a file that does not say so, as `model.safetensors` of a release."""
    state = safetensors.torch.load_file(made / "diffusion.safetensors")
    safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


def damaged(folder: Path, made: Path) -> Path:
    (folder / "half.safetensors").write_bytes((made / "diffusion.safetensors").read_bytes()[:5000])
    return folder / "half.safetensors"


# fmt: off
REFUSED: dict[str, tuple[Callable[[Path, Path], Path], tuple[str, ...], str]] = {
    "missing": (lambda d, made: d / "none", (), "none: no such file"),
    "damaged": (damaged, (), "not a safetensors file, or damaged"),
    "not stated": (of_a_release, (), "does not state what it was trained on"),
    "the other network": (lambda d, made: made / "query.safetensors", (), "holds the query network"),
    "another width": (lambda d, made: made, ("model.width=16",), "of another network: width 8, not 16"),
    "another resolution": (lambda d, made: made, ("data.resolution=16", "data.sensitive.kind=mnist"),
        "resolution 8, not 16"),
    "a GAN": (lambda d, made: made, ("method=privimage+g",),
        "starters are of diffusion models, privimage+g trains a GAN"),
}
# fmt: on


@pytest.mark.parametrize("name", REFUSED)
def test_other_weights_end_in_one_line_before_anything_is_begun(
    name: str, made: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path, more, said = REFUSED[name]
    settings = config(tmp_path, f"pretrain.start_from={path(tmp_path, made)}", *more)
    assert pipeline.run(settings, ("prepare", "query", "pretrain")) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "pretrain.start_from" in line]
    assert len(lines) == 1 and said in lines[0]
    assert not (settings.run.dir / "prepare").exists()


def test_a_query_network_of_another_kind_is_refused(made: Path, tmp_path: Path) -> None:
    settings = config(tmp_path, f"query.start_from={made}", "query.network=resnet50")
    with pytest.raises(UserError, match=r"query\.start_from: .* network resnet-small, not resnet50"):
        pipeline.execute(settings, ("prepare", "query"), ALONE)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("data.public.labelled=false", "method=pdp-diffusion"), "the public set needs labels"),
        (("query.network=resnet50",), r"query\.network: a file of 5\d MB"),
        (SHAPE, r"data\.sensitive\.count"),
    ],
)
def test_what_cannot_become_a_starter_is_refused_before_it_is_begun(
    overrides: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        command.run(config(tmp_path, *overrides), tmp_path / "starter", "", "")
    assert not list(tmp_path.iterdir())


def test_weights_beyond_half_precision_are_no_starter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.weight is beyond half precision"):
        starter.write(tmp_path, "query", {"a.weight": torch.tensor([1e6])}, {})


def test_another_starter_is_another_stage_for_runs_that_share(made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((made / "query.safetensors").read_bytes())
    fixed = ["runtime.precision=fp32", "finetune.precision=fp32", f"run.shared={tmp_path / 'shared'}"]
    settings = config(tmp_path, f"query.start_from={copy}", *fixed)
    pipeline.execute(settings, ("prepare", "query"), ALONE)
    other = RunDir(tmp_path / "other")
    pipeline.execute(
        settings.model_copy(update={"run": settings.run.model_copy(update={"dir": other.path})}),
        ("prepare",),
        ALONE,
    )
    state = dict(read(made, "query").weights)
    state["head.bias"] = state["head.bias"] + 1
    starter.write(tmp_path, "query", state, read(made, "query").stated).replace(copy)
    assert not sharing.adopt("query", settings, other, ALONE)
    copy.write_bytes((made / "query.safetensors").read_bytes())
    assert sharing.adopt("query", settings, other, ALONE)


def test_a_rehearsal_begins_without_the_starter(tmp_path: Path) -> None:
    """It may have seen the public images that stand for the sensitive ones."""
    settings = config(tmp_path, "query.start_from=somewhere", "pretrain.start_from=somewhere")
    (tmp_path / "base.yaml").write_text(rehearse._base(settings, tmp_path, 100, 3))
    base = load(tmp_path / "base.yaml")
    assert base.query.start_from is None and base.pretrain.start_from is None
