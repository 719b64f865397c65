"""What leaves: each format read back by the library of its ecosystem, the data card, and the allow-list."""

import getpass
import socket
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from ranks import REPOSITORY, TINY

from privimage import torchvision_operators
from privimage.config import Config, load
from privimage.config.methods import METHODS, PAPERS
from privimage.config.results import Synthesize
from privimage.families import family
from privimage.releases import assemble as assembling
from privimage.releases.assemble import assemble, require_allowed
from privimage.releases.formats import FORMATS
from privimage.releases.formats.png import folder_name
from privimage.releases.synthetic import SyntheticSet

CLASSES = ("zebra", "10", "a/b", ".hidden", "naïve", "<i>|x|")  # neither safe nor in alphabetical order
SAID: dict[str, Any] = {
    "method": "privimage+d",
    "private": True,
    "neighbours": "add or remove one image",
    "unit": "image",
    "accountant": "pld",
    "epsilon": 9.9,
    "delta": 1e-4,
    "promised_epsilon": 10.0,
    "mechanisms": [
        {
            "name": "DP-SGD fine-tuning",
            "mechanism": "Poisson-sampled Gaussian",
            "noise_multiplier": 2.0,
            "sample_rate": 0.3,
            "count": 10,
        }
    ],
    "noise_source": "aes-ctr",
    "cryptographic_noise": True,
    "versions": {"privimage": "0.1.0", "torch": "2", "python": "3"},
}


def synthetic(channels: int, count: int = 23) -> SyntheticSet:
    images = np.random.default_rng(channels).integers(0, 256, (count, 8, 8, channels), dtype=np.uint8)
    return SyntheticSet(images, np.arange(count) % len(CLASSES), CLASSES)


def config(formats: tuple[str, ...] = tuple(FORMATS), channels: int = 1) -> Config:
    return load(TINY, [f"synthesize.formats=[{','.join(formats)}]", f"data.channels={channels}"])


@pytest.fixture(scope="module", params=[1, 3], ids=["grey", "colour"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `release` in all formats."""
    if missing := [name for name in FORMATS if FORMATS[name].missing()]:
        pytest.skip(f"{', '.join(missing)}: not installed")
    folder = tmp_path_factory.mktemp("released")
    (folder / "release").mkdir()
    assemble(folder / "release", config(), synthetic(request.param), SAID, labelled=True)
    return folder


def lines_of(name: str) -> str:
    """Lines as documented; on machines without torchvision's compiled operators, which they do not use."""
    torchvision_operators.declare()
    return FORMATS[name].load


def loaded(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the two lines of a format leave behind."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(lines_of(name), names)
    return names


def arrays(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(folder / "release" / "synthetic.npz") as data:
        return data["images"], data["labels"]


def pixels(picture: Any, channels: int) -> np.ndarray:
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array[..., :channels]


def test_the_arrays_are_the_set(released: Path) -> None:
    images, labels = arrays(released)
    same = synthetic(images.shape[3])
    assert (images == same.images).all() and (labels == same.labels).all()


def test_torchvision_reads_the_folder_of_images(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = loaded("png", released, monkeypatch)["dataset"]
    images, labels = arrays(released)
    assert set(dataset.classes) == {folder_name(name) for name in CLASSES}
    assert len(dataset) == len(images)
    for path, label in dataset.samples:
        number = int(Path(path).stem)
        assert dataset.classes[label] == folder_name(CLASSES[labels[number]])
        assert (pixels(dataset.loader(path), images.shape[3]) == images[number]).all()


def test_datasets_reads_parquet_with_class_names(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", released / "cache")
    dataset = loaded("parquet", released, monkeypatch)["dataset"]
    images, labels = arrays(released)
    assert dataset.features["label"].names == list(CLASSES)
    assert dataset["label"][:] == labels.tolist()
    assert all((pixels(row["image"], images.shape[3]) == images[n]).all() for n, row in enumerate(dataset))
    dataset.cleanup_cache_files()


@pytest.mark.parametrize("name", ["png", "webdataset"])
def test_datasets_reads_the_other_formats_by_the_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "release").mkdir()
    assemble(tmp_path / "release", config((name,)), synthetic(3), SAID, labelled=True)
    dataset = datasets.load_dataset(str(tmp_path / "release"), split="train")
    column = "image" if name == "png" else "png"
    images = {np.asarray(picture).tobytes() for picture in dataset[column]}
    assert images == {image.tobytes() for image in synthetic(3).images}


def test_webdataset_streams_the_tars(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.setattr("privimage.releases.formats.webdataset.SHARD", 10)
    images, labels = arrays(released)
    again = released / "shards"
    again.mkdir(exist_ok=True)
    FORMATS["webdataset"].write(again, synthetic(images.shape[3]))  # in three files
    assert len(list((again / "webdataset").iterdir())) == 3
    for folder in (released / "release", again):
        lines = FORMATS["webdataset"].load.replace("release/", f"{folder}/")
        names: dict[str, Any] = {}
        exec(lines.replace("000000.tar", "{000000..000002}.tar") if folder == again else lines, names)
        found = list(names["dataset"])
        assert [sample["cls"] for sample in found] == labels.tolist()
        assert all(
            (pixels(sample["png"], images.shape[3]) == images[n]).all() for n, sample in enumerate(found)
        )


def test_ffcv_reads_the_beton(released: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loaded("beton", released, monkeypatch)["loader"]
    images, labels = arrays(released)
    read = [(image.numpy().copy(), label.numpy().copy()) for image, label in loader]
    assert (np.concatenate([image for image, _ in read]).transpose(0, 2, 3, 1) == images).all()
    assert (np.concatenate([label for _, label in read])[:, 0] == labels).all()


def test_the_card_and_the_documentation_show_the_lines_that_are_tested(released: Path) -> None:
    card = (released / "release" / "README.md").read_text()
    documentation = (REPOSITORY / "docs" / "release.md").read_text()
    for known in FORMATS.values():
        assert known.load in card and known.load in documentation
        assert len([line for line in known.load.splitlines() if line]) == 2


def test_equal_sets_give_equal_bytes_without_a_trace_of_the_machine(tmp_path: Path) -> None:
    settings = config(("parquet", "png", "webdataset", "beton"))
    generator = family(settings).generator(settings, len(CLASSES))
    weights = {"ema": generator.state_dict(), "n_classes": len(CLASSES), "classes": list(CLASSES)}
    contents = []
    for name in ("one", "two"):
        (folder := tmp_path / name).mkdir()
        assemble(folder, settings, synthetic(1), SAID, labelled=True, weights=weights)
        contents.append(
            {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        )
    assert contents[0] == contents[1]
    assert {"model.pt", "model.safetensors", "config.json", "README.md", "samples.png"} <= set(contents[0])
    for content in contents[0].values():
        for trace in (str(tmp_path), str(REPOSITORY), socket.gethostname(), getpass.getuser()):
            # Two letters may be anywhere among the numbers of weights.
            assert len(trace) < 4 or trace.encode() not in content, trace


def test_what_a_format_writes_is_on_the_allow_list_and_nothing_else(released: Path) -> None:
    require_allowed(released / "release")
    for stranger in ("images/zebra/notes.txt", "data/private.parquet", "webdataset/root.key", ".hidden"):
        path = released / "release" / stranger
        path.touch()
        with pytest.raises(RuntimeError, match="not on the allow-list"):
            require_allowed(released / "release")
        path.unlink()


def test_assembling_checks_the_allow_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembling, "card", lambda *_: "text")
    (tmp_path / "root.key").touch()
    with pytest.raises(RuntimeError, match=r"root\.key"):
        assemble(tmp_path, config(()), synthetic(1), SAID, labelled=True)


def test_the_card_tells_the_promise_and_leaves_the_licence_to_the_owner(released: Path) -> None:
    _, header, text = (released / "release" / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["license"] is None and "to be filled in by the owner" in header
    assert told["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    assert told["size_categories"] == ["n<1K"] and "differential-privacy" in told["tags"]
    assert "(9.9, 0.0001)-differential privacy" in text
    assert "add or remove one image" in text and "Li et al., PrivImage" in text
    assert r"\<i\>\|x\|" in text and "<i>" not in text  # names of classes are data, not Markdown


def test_a_card_without_a_promise_says_so(tmp_path: Path) -> None:
    said = SAID | {"private": False, "reason": "not private: a fixed key was used", "epsilon": None}
    assemble(tmp_path, config(()), synthetic(1), said, labelled=True)
    text = (tmp_path / "README.md").read_text()
    assert "# Not private" in text and "Do not share it" in text
    assert "What is not covered" not in text and "configs:" not in text


def test_an_unlabelled_set_has_one_class_and_no_table(tmp_path: Path) -> None:
    images = synthetic(1).images
    assemble(
        tmp_path, config(("png",)), SyntheticSet(images, np.zeros(23, int), ("all",)), SAID, labelled=False
    )
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["all"]
    text = (tmp_path / "README.md").read_text()
    assert "| label |" not in text and "unconditional-image-generation" in text


def test_every_format_can_be_set_and_every_private_method_is_cited() -> None:
    known = get_args(get_args(Synthesize.model_fields["formats"].annotation)[0])
    assert set(known) == set(FORMATS)
    assert {name for name, method in METHODS.items() if method.private} == set(PAPERS)


def test_a_full_disk_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from privimage.errors import UserError

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device"):
        assemble(tmp_path, config(("png",)), synthetic(1), SAID, labelled=True)


@pytest.mark.parametrize("method", ["dpdm", "dpgan", "dp-merf"])
def test_the_safetensors_hold_the_weights_of_the_model(method: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from privimage.models import built
    from privimage.storage.files import read_json

    settings = load(TINY, [f"method={method}"])
    torch.manual_seed(0)
    generator = family(settings).generator(settings, 6)
    weights = {"ema": generator.state_dict(), "n_classes": 6, "classes": list(CLASSES)}
    said = SAID | {"method": method}
    assemble(tmp_path, settings, synthetic(1), said, labelled=True, weights=weights)
    described = read_json(tmp_path / "config.json")
    network = built(described["_class_name"], described["arguments"])
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    same = torch.load(tmp_path / "model.pt", weights_only=True)["weights"]
    assert all(torch.equal(value, same[name]) for name, value in network.state_dict().items())
    assert described["id2label"]["1"] == "10" and described["sample_size"] == 8
