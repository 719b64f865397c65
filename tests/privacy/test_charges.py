"""No byte that follows from a private step is written before its charge is on the disk."""

import json
from pathlib import Path
from typing import Any

import pytest

from privimage.config import Config
from privimage.distributed import checkpoint
from privimage.runs import pipeline
from privimage.stages import finetune, private_curves
from privimage.storage.files import read_json
from privimage.telemetry.curves import Curves


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_charges_are_on_the_disk_before_checkpoints_and_curves(
    tiny_config: Config, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """With a write after each step, and with one per checkpoint."""
    config = tiny_config.model_copy(update={"method": "dpdm"})
    monkeypatch.setattr(private_curves, "FLUSH_SECONDS", seconds)
    monkeypatch.setattr(finetune, "_shares_writes", lambda world: True)  # as on a GPU
    folder = config.run.dir
    seen = {"checkpoints": 0, "points": 0}

    def on_disk() -> set[str]:
        ledger = Path(read_json(folder / "private" / "account.json")["ledger"]["path"])
        entries = [json.loads(line) for line in ledger.read_text().splitlines()]
        return {entry["charge"] for entry in entries if "charge" in entry}

    save, scalars = checkpoint.save, Curves.scalars

    def saved(path: Path, state: dict) -> None:
        if path.parent.name == "finetune":
            assert set(state["charges"]["finetune"]) <= on_disk()
            seen["checkpoints"] += 1
        save(path, state)

    def drawn(self: Curves, step: int, values: dict[str, Any]) -> None:
        assert len(on_disk()) >= step
        seen["points"] += 1
        scalars(self, step, values)

    monkeypatch.setattr(checkpoint, "save", saved)
    monkeypatch.setattr(Curves, "scalars", drawn)
    assert pipeline.run(config, ["finetune"]) == 0
    assert seen == {"checkpoints": 5, "points": 16}
