"""Killed at any moment and started again, a run ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

from ranks import clean_environment


def test_random_kills_change_nothing() -> None:
    """24 kills at random moments; `kills.py --kills 200` is the long form, its table is in docs/results.md."""
    script = Path(__file__).with_name("kills.py")
    ended = subprocess.run([sys.executable, str(script), "--kills", "24"], capture_output=True, text=True, timeout=900, env=clean_environment())
    assert ended.returncode == 0, ended.stdout + ended.stderr[-2000:]
    assert "| all | 24 |" in ended.stdout
