"""Everything that can be found out about a run before it is begun: `privimage doctor`, and before submission.

The checks before a run (`preflight`) for all of its stages, and beside them what a run would notice too late:
file systems, devices, memory, and the connection between the ranks. Makes nothing that stays, and spends
nothing.
"""

import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod

from rich.console import Console
from rich.table import Table

from privimage.config import Config
from privimage.distributed.world import World
from privimage.families.base import image_shape
from privimage.families.work import PARAMETER_BYTES
from privimage.recipes import settled
from privimage.runs import preflight, room, starters
from privimage.runs.devices import Row, connection, devices, in_job
from privimage.runs.visit import Visit
from privimage.storage.lock import HeldError, Lock
from privimage.storage.rundir import RunDir
from privimage.telemetry import memory

RANK_BYTES = 2 << 30  # of a rank without images and networks: Python, torch and its libraries


@dataclass
class Diagnosis:
    """All rows of a diagnosis."""

    rows: list[Row] = field(default_factory=list)

    @property
    def mistakes(self) -> int:
        """How many rows tell a mistake."""
        return sum(row.state == "mistake" for row in self.rows)

    def show(self) -> None:
        """Print the table; it is 120 columns wide where the output is not a terminal."""
        console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
        table = Table("check", "", "what was found, and what to do", title_justify="left")
        colours = {"ok": "green", "warning": "yellow", "mistake": "bold red"}
        for row in self.rows:
            table.add_row(row.name, f"[{colours[row.state]}]{row.state}[/]", row.text)
        console.print(table)
        console.print(f"{self.mistakes} mistakes" if self.mistakes else "ready")


def diagnose(config: Config, world: World, device_error: str = "") -> Diagnosis:
    """Look at everything that the unfinished stages of a run need. All ranks of `world` call it together.

    `device_error` is why no device could be taken; `world` is then one without it.
    """
    run = RunDir(config.run.dir)
    config = settled(config, world, run)
    stages = frozenset(stage for stage in config.stages if run.record(stage) is None)
    visit = Visit(config, run, world, stages)
    diagnosis = Diagnosis()
    for name, check in CHECKS.items():
        rows = _rows(name, visit, check)
        # Mistakes of all ranks, each once: nodes may differ in their disks and libraries.
        for found in world.gather_objects(rows):
            diagnosis.rows += [row for row in found if row not in diagnosis.rows]
    if device_error:
        diagnosis.rows.append(Row("device", "mistake", device_error))
    else:
        diagnosis.rows.append(devices(config, world, stages))
    diagnosis.rows += _rows("memory", visit, room_in_memory)
    diagnosis.rows += requests(config)
    if world.size > 1:
        diagnosis.rows.append(connection(world))
    # Without mistakes, one line per check is enough.
    named = {row.name for row in diagnosis.rows if row.state != "ok"}
    diagnosis.rows = [row for row in diagnosis.rows if row.state != "ok" or row.name not in named]
    return diagnosis


def _rows(name: str, visit: Visit, check: Callable[[Visit], Iterable[str] | None]) -> list[Row]:
    visit.mistakes, visit.warnings = [], []
    visit.attempt(check)
    if visit.mistakes:
        return [Row(name, "mistake", line) for line in visit.mistakes]
    if visit.warnings:
        return [Row(name, "warning", line) for line in visit.warnings]
    return [Row(name, "ok", _detail(name, visit))]


def _detail(name: str, visit: Visit) -> str:
    """What is worth saying of a check that found no mistake."""
    if name == "sensitive set" and visit.sensitive is not None:
        return f"{len(visit.sensitive):,} images, {len(visit.sensitive.classes)} classes"
    if name == "public set" and visit.public is not None:
        return f"{visit.public[0]:,} images, {len(visit.public[1])} classes"
    if name == "networks" and visit.sizes:
        return ", ".join(f"{network} {size:,} parameters" for network, size in visit.sizes.items())
    return ""


def run_directory(visit: Visit) -> Iterator[str]:
    """The file system of the run directory has what a run needs: rename, and locks that other nodes see."""
    path = visit.run.path
    if path.exists() and not path.is_dir():
        yield f"run.dir: {path} is a file; choose another"
        return
    place = room.standing(path)
    trial = place / f".privimage-doctor-{socket.gethostname()}-{secrets.token_hex(4)}"
    try:
        trial.mkdir(mode=0o700)
        (trial / "a").write_bytes(b"1")
        (trial / "a").replace(trial / "b")
        handle = os.open(trial / "b", os.O_RDWR)
        try:
            Lock(trial / "b", handle, wait=False).close()
        finally:
            os.close(handle)
    except OSError as error:
        yield f"run.dir: {place} cannot be written ({error.strerror})"
    except HeldError:
        yield f"run.dir: {place}: a lock that nobody holds is taken; choose another file system"
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def room_in_memory(visit: Visit) -> Iterator[str]:
    """The memory of a node has room for the least that its ranks need, by what is asked for or is there."""
    config, world = visit.config, visit.world
    parameters, pixels = sum(visit.sizes.values()), prod(image_shape(config))
    # Batches and the sensitive set adapt to the memory; these do not.
    images = 3 * pixels * config.synthesize.samples
    least = {
        "pretrain": PARAMETER_BYTES * parameters,
        "finetune": (PARAMETER_BYTES + 8) * parameters,
        "synthesize": PARAMETER_BYTES * parameters + images,
        "evaluate": images,
    }
    for stage in visit.stages & least.keys():
        asked = config.slurm.of(stage)
        ranks = asked.ranks or asked.gpus or world.local_size
        needed = ranks * RANK_BYTES + least[stage]
        if asked.memory:
            there, where = _bytes(asked.memory), f"slurm.memory of {asked.memory}"
        else:
            there, where = memory.available(), f"the free memory of {socket.gethostname()}"
        # Jobs without a limit of their own run on nodes that are not looked at here.
        if needed > there and (asked.memory or not asked.gpus or in_job()):
            yield (
                f"{stage}: {ranks} ranks of a node need {needed / 2**30:.1f} GiB, more than {where}, "
                f"{there / 2**30:.1f} GiB; ask for more, or for fewer ranks"
            )


def _bytes(text: str) -> int:
    """SLURM's notation of memory: 200G; without a letter, mebibytes."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(text[-1], 1 << 20)
    return int(text.rstrip("KMGT")) * factor


def requests(config: Config) -> list[Row]:
    """What the jobs ask for fits what the stages do."""
    rows = []
    for stage in set(config.stages) - {"prepare", "evaluate"}:
        if config.runtime.device == "cuda" and config.slurm.of(stage).gpus == 0:
            told = f"slurm.stages.{stage}: no GPU is asked for, and runtime.device is cuda; set gpus"
            rows.append(Row("jobs", "mistake", told))
    return rows or [Row("jobs", "ok", "")]


CHECKS: dict[str, Callable[[Visit], Iterable[str] | None]] = {
    "run directory": run_directory,
    "packages": preflight.packages,
    "sensitive set": preflight.sensitive_set,
    "held-out images": preflight.held_out_images,
    "public set": preflight.public_set,
    "DeepSpeed settings": preflight.engine_settings,
    "feature weights": preflight.feature_weights,
    "word vectors": preflight.word_vectors,
    "votes": preflight.votes,
    "networks": preflight.networks,
    "starters": starters.fitting,
    "privacy plan": preflight.privacy_plan,
    "usefulness": preflight.usefulness,
    "ledger": preflight.ledger,
    "disk space": preflight.disk_space,
}
