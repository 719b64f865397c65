"""Runs the stages in order: skips finished ones, measures the others, and ends all ranks together."""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from privimage.config import Config
from privimage.config.stages import ON_REQUEST
from privimage.distributed import precision
from privimage.distributed.preemption import stop
from privimage.distributed.world import World, connect
from privimage.errors import Mistakes, Stopped, UserError, leave_status, tell
from privimage.recipes import settled
from privimage.runs import preflight, sharing
from privimage.storage import owner_only
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir
from privimage.telemetry import compute, memory
from privimage.telemetry.progress import say


def run(
    config: Config, stages: Sequence[str] = (), afterwards: Callable[[RunDir, World], None] | None = None
) -> int:
    """Run `stages`, or all stages of the method, as a command does, and return the exit status.

    0 done, 2, 75 or 1 (see `privimage.errors`). The main rank calls `afterwards` once they are done. Signals
    request a stop, and what ends the run early is written to standard error, whichever rank it happened on.
    Raises UserError only where the ranks cannot connect.
    """
    world = connect(config.runtime)
    stop.install(announced=world.is_main)
    status = 0
    try:
        run_dir = execute(config, stages, world)
        if afterwards is not None:
            if world.is_main:
                afterwards(run_dir, world)
            world.barrier()
        if world.is_main:
            leave_status(status)
    except Stopped as error:
        status = Stopped.status
        if world.is_main:
            tell(str(error), status)
    except (Exception, KeyboardInterrupt) as error:
        status = world.fail(error)
    world.close()
    return status


def execute(config: Config, stages: Sequence[str], world: World) -> RunDir:
    """Run `stages`, or all stages of the method where none are named; finished ones are skipped.

    All ranks of `world` call it together. From here on this process writes files that only its user can read.
    Raises UserError for a mistake in the settings or the data, and Stopped.
    """
    owner_only.close_process()
    # One run at a time in a directory, whose settings must agree with what was made there before.
    with _claimed(config, world) as (run_dir, settings):
        resolved = precision.resolved(settings, world)
        names = _known(stages, settings)
        # Everything that later stages need is checked now, before hours are spent.
        preflight.check(resolved, run_dir, world, names)
        for name in names:
            _run_stage(name, resolved, run_dir, world)
    return run_dir


@contextlib.contextmanager
def _claimed(config: Config, world: World) -> Iterator[tuple[RunDir, Config]]:
    # The main rank holds the directory and answers for its settings, those that were left at `auto` too;
    # where it fails, the others end in this barrier.
    run_dir = RunDir(config.run.dir)
    with run_dir.lock() if world.is_main else contextlib.nullcontext():
        try:
            if world.is_main:
                run_dir.close_to_others()
            config = settled(config, world, run_dir)
            if world.is_main:
                run_dir.reconcile(config)
                run_dir.note_failure(None)
            world.barrier()
            yield run_dir, config
        except Stopped:
            world.barrier()  # nobody ends while another rank is saving
            raise
        except (Exception, KeyboardInterrupt) as error:
            run_dir.note_failure(_in_short(error))
            raise


def _known(stages: Sequence[str], config: Config) -> Sequence[str]:
    """`stages`, or all of the method where none are named. Raises UserError for one that it does not have."""
    # A misspelt stage is refused before anything is opened.
    for name in stages:
        if name not in config.stages:
            asked = f"; {ON_REQUEST[name]} asks for it" if name in ON_REQUEST else ""
            raise UserError(
                f"method: {config.method} has no stage {name}; it runs {', '.join(config.stages)}{asked}"
            )
    return stages or config.stages


def _in_short(error: BaseException) -> str:
    """Why a run ends early, in one line."""
    # Mistakes have a line each; one is enough for a table of many runs.
    first, *more = str(error).splitlines() or [""]
    if isinstance(error, Mistakes) and more:
        first += f" (and {len(more)} more)"
    return first if isinstance(error, UserError) else f"{type(error).__name__}: {first}"


def _run_stage(name: str, config: Config, run_dir: RunDir, world: World) -> None:
    # The main rank tells which stages are finished: another node may not see their records yet.
    run_dir.records = world.broadcast_object(run_dir.read_records() if world.is_main else None)
    if run_dir.record(name) is not None:
        if world.is_main:
            say(f"{name}: done before")
        return
    if stop.agreed(world):
        raise Stopped(f"before {name}; run again to go on")
    # A public stage that another run has finished is taken over instead of being repeated.
    if world.broadcast_object(world.is_main and sharing.adopt(name, config, run_dir, world)):
        return
    if world.is_main:
        say(f"{name}: {world.size} rank{'s' if world.size > 1 else ''} on {world.device.type}")
    # Time and memory are those of the stage; the record is what marks it as finished.
    memory.reset_peak(world.device)
    with _timed(run_dir.path / name / "elapsed.json", world) as taken:
        record = importlib.import_module(f"privimage.stages.{name}").run(config, run_dir, world)
        world.barrier()  # of no time limit: the main rank may be writing what the others need
        times = taken()
    measured = {
        "seconds": times["seconds"],
        "cpu_seconds": sum(_of_ranks(times["cpu_seconds"], world)),
        "gpu_seconds": compute.gpu_seconds(times["seconds"], world.device, world.size),
        "peak_memory_bytes": int(max(_of_ranks(memory.peak(world.device), world))),
        "ranks": world.size,
        "images_per_second": record["images"] / times["seconds"],
    }
    if world.is_main:
        run_dir.finish(name, {**record, **measured})
        sharing.keep(name, config, run_dir, world)
    world.barrier()


@contextlib.contextmanager
def _timed(path: Path, world: World) -> Iterator[Callable[[], dict[str, float]]]:
    """Seconds, and CPU seconds of this rank, of a stage over all its resumes; those of a killed one are lost.

    What other ranks used before a resume is taken to be what the main rank did.
    """
    before = read_json(path) if path.exists() else {}
    started, used = time.monotonic(), compute.cpu_seconds()

    def taken() -> dict[str, float]:
        return {
            "seconds": before.get("seconds", 0.0) + time.monotonic() - started,
            "cpu_seconds": before.get("cpu_seconds", 0.0) + compute.cpu_seconds() - used,
        }

    try:
        yield taken
    finally:
        if world.is_main and path.parent.exists():
            try:
                path.parent.rmdir()  # nothing was done yet, so that settings may still be changed
            except OSError:
                write_json(path, taken())


def _of_ranks(value: float, world: World) -> list[float]:
    """A number of each rank."""
    # A sum stands for the gather: each rank fills its own place.
    values = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    values[world.rank] = value
    return world.all_reduce_(values).tolist()
