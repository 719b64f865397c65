"""The run directory: one folder per stage, `private/` that never leaves, `release/` that may."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf
from yaml import YAMLError

from privimage.config import Config, parse
from privimage.config.effects import effect
from privimage.config.stages import STAGES, upstream
from privimage.errors import UserError
from privimage.storage import owner_only
from privimage.storage.files import read_json, write_json, write_whole
from privimage.storage.lock import HeldError, Lock


class Clash(NamedTuple):
    """A setting that may no longer change, because something was made with its old value."""

    key: str
    old: object
    new: object
    stages: tuple[str, ...]  # the stages begun that depend on it; none: it is part of the fixed privacy plan


class RunDir:
    """Paths and records of one run. Stages read what earlier ones left here and write their own folder."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.records: dict[str, dict] | None = None  # as the main rank has told them; None: read from disk

    @property
    def private(self) -> Path:
        """Keys, plan, losses of fine-tuning, metrics on sensitive data: never shared."""
        return self._folder(self.path / "private")

    @property
    def sensitive(self) -> Path:
        """The decoded sensitive set, one folder per split."""
        return self._folder(self.private / "sensitive")

    @property
    def release(self) -> Path:
        """The only folder that is meant to leave; `synthesize` makes it when all that it holds is there."""
        return self.path / "release"

    @property
    def tensorboard(self) -> Path:
        """Public curves; those of fine-tuning are in `private/tensorboard`."""
        return self._folder(self.path / "tensorboard")

    def stage(self, name: str) -> Path:
        """The folder of one stage."""
        return self._folder(self.path / name)

    def _folder(self, path: Path) -> Path:
        """Make a folder that only its owner can read.

        Below the run directory, the owner of the run directory is accepted too, as on a mounted disk.
        """
        return owner_only.folder(path, self._owner())

    def _whole(self) -> Path:
        """The run directory itself, which may be reached through a link."""
        return owner_only.folder(self.path.resolve(), self._owner())

    def close_to_others(self) -> None:
        """Restrict all that is in a directory from before.

        Raises UserError for links in it, and for what belongs to another user.
        """
        names = ("config.yaml", "failed.json", ".lock", "private", "tensorboard", *STAGES)
        owner_only.restrict_all([self.path / name for name in names], self._owner())

    def _owner(self) -> int | None:
        """The owner of the run directory, if this process is root; else None."""
        return self.path.stat().st_uid if os.geteuid() == 0 and self.path.exists() else None

    def record(self, stage: str) -> dict | None:
        """What a finished stage wrote down (seconds, memory, figures); None while it is not finished."""
        if self.records is not None:
            return self.records.get(stage)
        return self._read_record(stage)

    def _read_record(self, stage: str) -> dict | None:
        path = self.path / stage / "done.json"
        return read_json(path) if path.exists() else None

    def require(self, stage: str) -> dict:
        """Record of a stage that must be finished by now. Raises UserError that says what to run."""
        record = self.record(stage)
        if record is None:
            raise UserError(
                f"{self.path}: stage {stage} is not finished; run `privimage {stage}` first, or `privimage "
                "run`"
            )
        return record

    def finish(self, stage: str, record: dict) -> None:
        """Mark a stage as finished; the last thing that it writes."""
        write_json(self.stage(stage) / "done.json", record)
        if self.records is not None:
            self.records[stage] = record

    def read_records(self) -> dict[str, dict]:
        """The records of all finished stages, from the disk."""
        records = {stage: self._read_record(stage) for stage in STAGES}
        return {stage: record for stage, record in records.items() if record is not None}

    @property
    def public_store(self) -> Path:
        """The prepared public set. Raises UserError if `prepare` is not finished."""
        return self.path / "prepare" / self.require("prepare")["store"]

    @property
    def failure(self) -> str | None:
        """Why the last attempt ended early, in one line; None if it did not, or could not say."""
        path = self.path / "failed.json"
        return read_json(path)["reason"] if path.exists() else None

    def note_failure(self, reason: str | None) -> None:
        """Keep why this attempt ends early; None forgets it."""
        if reason is None:
            (self.path / "failed.json").unlink(missing_ok=True)
        else:
            write_json(self._whole() / "failed.json", {"reason": reason})

    @property
    def is_running(self) -> bool:
        """Whether a run holds this directory now."""
        if not (self.path / ".lock").exists():
            return False
        try:
            with self.lock():
                pass
        except UserError:
            return True
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory against a second run.

        Raises UserError when it is held, or cannot be written.
        """
        try:
            self._whole()
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except UserError as error:
            raise UserError(f"run.dir: {error}") from None
        except OSError as error:
            raise UserError(f"run.dir: {self.path} cannot be written ({error.strerror})") from None
        try:
            with Lock(self.path / ".lock", handle, wait=False):
                yield
        except HeldError as error:
            used = f"another run is using this directory{f' ({error})' if str(error) else ''}"
            raise UserError(f"{self.path}: {used}; wait for it, or choose another run.dir") from None
        finally:
            os.close(handle)

    def reconcile(self, config: Config) -> None:
        """Write `config.yaml`, or compare with the one that is there.

        Settings of stages already begun must be the same.

        Raises UserError that names each setting that differs and says how to go on.
        """
        path = self.path / "config.yaml"
        if clashes := self.clashes(config):
            changes = "; ".join(f"{clash.key} was {clash.old!r}, now {clash.new!r}" for clash in clashes)
            begun = {stage for clash in clashes for stage in clash.stages}
            again = ""
            if all(clash.stages for clash in clashes):  # the privacy plan cannot be made again
                folders = ", ".join(f"{name}/" for name in STAGES if name in begun)
                again = f", or delete {folders} to do these stages again"
            raise UserError(
                f"{path}: this run was made with other settings ({changes}); choose another run.dir, or go "
                f"on with the old values (`privimage run {path}`){again}"
            )
        write_whole(path, config.to_yaml().encode())

    def settings(self) -> dict:
        """The settings that this run was made with, as plain values; empty before its first start.

        Raises UserError for a damaged config.yaml.
        """
        path = self.path / "config.yaml"
        return _plain(path) if path.exists() else {}

    def clashes(self, config: Config) -> list[Clash]:
        """The settings that differ from those of this run although something depends on their old values.

        Raises UserError for a damaged config.yaml.
        """
        if not (before := self.settings()):
            return []
        # A stage depends on the settings of all stages before it, also of those whose folder was deleted.
        begun = {name: set(upstream(name, config.stages)) for name in STAGES if self._has_begun(name)}
        plan_is_fixed = (self.path / "private" / "account.json").exists()
        clashes = []
        for key, old, new in differences(before, config.model_dump(mode="json")):
            declared = effect(key)
            stages = tuple(name for name, read in begun.items() if read & declared.stages)
            if declared.planned and plan_is_fixed:
                clashes.append(Clash(key, old, new, ()))
            elif stages:
                clashes.append(Clash(key, old, new, stages))
        return clashes

    def _has_begun(self, stage: str) -> bool:
        """Whether a stage holds something that its settings made.

        What `prepare` has decoded so far has an identity of its own: a setting that was missing for some
        image may be added until the store is there.
        """
        place = self.path / stage
        return (place / "done.json" if stage == "prepare" else place).exists()


def _plain(path: Path) -> dict:
    try:
        tree = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OSError, UnicodeDecodeError):
        tree = None
    if not isinstance(tree, dict) or not tree:
        raise UserError(
            f"{path}: damaged, not readable as YAML; put back the settings that the run was made with"
        )
    with contextlib.suppress(UserError):  # settings that are younger than the run had their defaults in it
        return parse(tree).model_dump(mode="json")
    return tree


def differences(old: dict, new: dict, prefix: str = "") -> list[tuple[str, object, object]]:
    """The settings that differ between two plain trees, as (key, old value, new value)."""
    different = []
    for key in dict.fromkeys([*old, *new]):
        a, b, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            different += differences(a, b, f"{name}.")
        elif a != b:
            different.append((name, a, b))
    return different
