"""Killed at any moment and started again, a run ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

import pytest
from ranks import clean_environment


@pytest.mark.parametrize(("method", "kills"), [("privimage+d", 4), ("dpgan-p", 2)])
def test_random_kills_change_nothing(method: str, kills: int) -> None:
    """Kills at random moments; `kills.py --kills 200` is the long form, its table is in docs/results.md."""
    script = Path(__file__).with_name("kills.py")
    ended = subprocess.run(
        [sys.executable, str(script), "--kills", str(kills), "--method", method],
        capture_output=True,
        text=True,
        timeout=900,
        env=clean_environment(),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert f"| all | {kills} |" in ended.stdout


def test_kills_between_which_files_move_and_change_release_no_epsilon_that_is_too_small() -> None:
    """`mutations.py --kills 1000` is the long form, its table is in docs/results.md."""
    script = Path(__file__).with_name("mutations.py")
    ended = subprocess.run(
        [sys.executable, str(script), "--kills", "5", "--seed", "3"],
        capture_output=True,
        text=True,
        timeout=900,
        env=clean_environment(),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert "5 kills: every release states" in ended.stdout
