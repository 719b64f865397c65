"""What an output depends on.

Each part of it makes another computation, with other noise, samples and charges.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from privimage.config import Config, parse
from privimage.distributed import precision
from privimage.distributed.world import ALONE
from privimage.privacy import identity
from privimage.privacy.account import charge_name
from privimage.privacy.identity import computation, digest_of, digest_of_tensors
from privimage.privacy.keys import RootKey, insecure_fixed

CONTENT = b"a set of images"


class Alone:
    """A single rank on a CPU."""

    rank, size, device = 0, 1, torch.device("cpu")

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return tensor


class Beside(Alone):
    """Rank 0 of two, the other of which runs on another processor."""

    size = 2

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        tensor[1] = 7
        return tensor


def named(
    config: Config,
    root: RootKey | None = None,
    content: bytes = CONTENT,
    own: dict | None = None,
    inputs: tuple = (),
    ranks: Alone | None = None,
) -> bytes:
    return computation(
        ranks or Alone(), root or insecure_fixed(0), content, config, "finetune", own or {}, inputs
    )


def changed(config: Config, key: str, value: object) -> Config:
    tree = config.model_dump(mode="json")
    *sections, name = key.split(".")
    inner = tree
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return parse(tree)


def test_the_same_computation_has_the_same_name(tiny_config: Config) -> None:
    assert named(tiny_config) == named(tiny_config)


def test_images_key_inputs_ranks_and_what_the_stage_adds_make_another_one(tiny_config: Config) -> None:
    names = {
        named(tiny_config),
        named(tiny_config, content=b"another set"),
        named(tiny_config, insecure_fixed(1)),
        named(tiny_config, inputs=(b"weights",)),
        named(tiny_config, own={"rows": 10}),
        named(tiny_config, ranks=Beside()),
    }
    assert len(names) == 6


def test_a_precision_that_the_device_decides_is_in_the_name(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto, chosen = tiny_config, tiny_config
    for section in ("runtime", "finetune"):
        auto = changed(auto, f"{section}.precision", "auto")
        chosen = changed(chosen, f"{section}.precision", "bf16")
    on_a_cpu = precision.resolved(auto, ALONE)
    monkeypatch.setattr(precision, "faster_in_bf16", lambda device: True)
    on_a_gpu = precision.resolved(auto, ALONE)
    assert named(on_a_gpu) == named(chosen) != named(on_a_cpu)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("runtime.seed", 1),
        ("runtime.precision", "bf16"),
        ("finetune.precision", "bf16"),
        ("finetune.max_grad_norm", 0.02),
        ("finetune.learning_rate", 0.5),
        ("finetune.noise_copies", 3),
        ("model.width", 16),
        ("data.resolution", 16),
        ("data.sensitive.labelled", False),
        ("privacy.noise_source", "chacha20"),
    ],
)
def test_settings_that_an_output_may_depend_on_make_another_one(
    tiny_config: Config, key: str, value: object
) -> None:
    assert named(changed(tiny_config, key, value)) != named(tiny_config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("run.dir", "elsewhere"),
        ("data.sensitive.path", "elsewhere"),
        ("data.workers", 4),
        ("privacy.ledger", "elsewhere"),
        ("synthesize.samples", 7),
        ("runtime.timeout_minutes", 9),
    ],
)
def test_settings_that_say_where_things_are_do_not(tiny_config: Config, key: str, value: object) -> None:
    assert named(changed(tiny_config, key, value)) == named(tiny_config)


def test_processor_threads_software_and_switches_make_another_one(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps with one noise and another rounding would show the difference."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor: 0\nmodel name: A\nflags: avx2\ncpu MHz: 2000\n\nprocessor: 1\nmodel name: A\nflags: "
        "avx2\n"
    )
    monkeypatch.setattr(identity, "PROCESSOR", cpuinfo)
    first = named(tiny_config)
    cpuinfo.write_text(cpuinfo.read_text().replace("2000", "2400"))
    assert named(tiny_config) == first
    cpuinfo.write_text("processor: 0\nmodel name: A\nflags: avx2 avx512f\n")
    assert named(tiny_config) != first
    cpuinfo.write_text("processor: 0\nmodel name: A\nflags: avx2\n")
    for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "default")
            assert named(tiny_config) != first
    torch.set_num_threads(2)
    other = named(tiny_config)
    torch.set_num_threads(1)
    assert other != first and named(tiny_config) == first
    with monkeypatch.context() as patch:
        patch.setattr(identity.metadata, "version", lambda name: "of tomorrow")
        identity._software.cache_clear()
        assert named(tiny_config) != first
    identity._software.cache_clear()
    assert named(tiny_config) == first


def test_where_a_part_begins_matters() -> None:
    assert digest_of(b"ab", b"c") != digest_of(b"a", b"bc")
    assert charge_name(insecure_fixed(0), b"ab", b"c") != charge_name(insecure_fixed(0), b"a", b"bc")


def test_tensors_differ_by_value_shape_type_and_order() -> None:
    a, b = torch.arange(6.0), torch.ones(3)
    names = [
        [a, b],
        [b, a],
        [a.view(2, 3), b],
        [a.double(), b],
        [a.bfloat16(), b],
        [a + 1e-6, b],
        [a],
        [torch.tensor(1.0)],
        [torch.zeros(0)],
    ]
    assert len({digest_of_tensors(tensors) for tensors in names}) == len(names)
    assert digest_of_tensors([a.view(2, 3).T]) == digest_of_tensors([a.view(2, 3).T.contiguous()])
    assert digest_of_tensors([a.numpy()]) == digest_of_tensors([a])
