"""What fine-tuning does after a restart: repeats exactly, or begins an attempt of its own and pays for what was lost."""

from pathlib import Path

import pytest
import torch

from privimage.config import Config
from privimage.privacy import attempts
from privimage.privacy.account import Account
from privimage.privacy.attempts import arranged, resume_attempt
from privimage.privacy.keys import insecure_fixed

SAME, OTHER = {"ranks": 2, "torch": "x"}, {"ranks": 3, "torch": "x"}


def test_the_first_attempt_makes_all_steps(tmp_path) -> None:
    attempt = resume_attempt(tmp_path / "attempts.json", SAME, 0, 100, lambda number: 0)
    assert (attempt.number, attempt.first, attempt.last) == (0, 0, 100)


def test_the_same_arrangement_repeats_itself(tmp_path) -> None:
    """40 charged, the checkpoint is at 30: steps 30 to 39 are replayed with the same noise and cost nothing again."""
    path = tmp_path / "attempts.json"
    first = resume_attempt(path, SAME, 0, 100, lambda number: 0)
    again = resume_attempt(path, SAME, 30, 100, lambda number: 0 if number == 0 else 40)
    assert again == first


def test_another_arrangement_pays_for_lost_steps_with_steps(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    second = resume_attempt(path, OTHER, 30, 100, lambda number: 0 if number == 0 else 40)
    assert (second.number, second.first, second.last) == (1, 30, 90)
    third = resume_attempt(path, SAME, 50, 100, lambda number: {1: 40, 2: 65}[number])
    assert (third.number, third.first, third.last) == (2, 50, 85)


def test_after_a_clean_stop_nothing_is_lost(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    assert resume_attempt(path, OTHER, 40, 100, lambda number: 40).last == 100


def test_a_lost_checkpoint_never_lets_more_than_t_steps_be_charged(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    resume_attempt(path, OTHER, 90, 100, lambda number: 90)
    lost = resume_attempt(path, OTHER, 0, 100, lambda number: 100)
    assert (lost.first, lost.last) == (0, 0)


def test_a_torn_charge_costs_a_step(tmp_path) -> None:
    path = tmp_path / "attempts.json"
    resume_attempt(path, SAME, 0, 100, lambda number: 0)
    assert resume_attempt(path, SAME, 10, 100, lambda number: 1).last == 99


class Alone:
    """A single rank on a CPU."""

    rank, size, device = 0, 1, torch.device("cpu")

    def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def test_whatever_an_output_depends_on_makes_another_arrangement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps with one noise, but other weights, seed, processor or software, would show their difference."""
    weights, root, settings = tmp_path / "weights.pt", insecure_fixed(0), {"runtime": {"seed": 0}}
    weights.write_bytes(b"first")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor: 0\nmodel name: A\nflags: avx2\ncpu MHz: 2000\n\nprocessor: 1\nmodel name: A\nflags: avx2\n")
    monkeypatch.setattr(attempts, "PROCESSOR", cpuinfo)
    first = arranged(Alone(), root, settings, [weights])
    cpuinfo.write_text(cpuinfo.read_text().replace("2000", "2400"))
    assert arranged(Alone(), root, settings, [weights]) == first
    assert arranged(Alone(), root, {"runtime": {"seed": 1}}, [weights]) != first
    assert arranged(Alone(), insecure_fixed(1), settings, [weights]) != first
    cpuinfo.write_text("processor: 0\nmodel name: A\nflags: avx2 avx512f\n")
    assert arranged(Alone(), root, settings, [weights]) != first
    cpuinfo.write_text("processor: 0\nmodel name: A\nflags: avx2\n")
    assert arranged(Alone(), root, settings, [weights]) == first
    monkeypatch.setattr(attempts.metadata, "version", lambda name: "of tomorrow")
    attempts._software.cache_clear()
    assert arranged(Alone(), root, settings, [weights]) != first
    monkeypatch.undo()
    attempts._software.cache_clear()
    weights.write_bytes(b"second")
    monkeypatch.setattr(attempts, "PROCESSOR", cpuinfo)
    assert arranged(Alone(), root, settings, [weights]) != first


def test_settings_that_may_change_within_a_run_but_enter_the_training_make_another_arrangement(tiny_config: Config) -> None:
    account = Account("run", None, insecure_fixed(0), None, True)  # type: ignore[arg-type]
    first = account.arrangement(tiny_config, Alone())
    assert account.arrangement(tiny_config, Alone()) == first
    for changed in ({"seed": 1}, {"precision": "bf16"}):
        assert account.arrangement(tiny_config.model_copy(update={"runtime": tiny_config.runtime.model_copy(update=changed)}), Alone()) != first
    moved = tiny_config.model_copy(update={"run": tiny_config.run.model_copy(update={"dir": Path("elsewhere")})})
    assert account.arrangement(moved, Alone()) == first
