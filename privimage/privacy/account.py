"""The account of a run: its plan, its key, and what it may still draw according to the ledger."""

import os
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from privimage.config import Config
from privimage.data.private_store import ImageSet
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.privacy import keys
from privimage.privacy.accounting import SampledGaussian
from privimage.privacy.identity import digest_of
from privimage.privacy.ledger import Ledger
from privimage.privacy.mechanisms import Mechanism
from privimage.privacy.plan import PrivacyPlan, make_plan, plan_from_dict, plan_without_noise
from privimage.privacy.records import VERSION, account_path, key_path, known_head, ledger_folder, read_account
from privimage.privacy.relation import Relation
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import say

Behind = dict[str, list[str]]  # the names of the charges that made something, by stage


@dataclass
class Account:
    """The account of a run, opened by each stage that draws from sensitive data. Only the main rank has the
    ledger.
    """

    run: str  # its name in the ledger
    plan: PrivacyPlan
    root: keys.RootKey
    private: bool  # false where the present settings add no noise or fix the key
    ledger: Ledger | None = None
    path: Path | None = None  # account.json

    def charge(self, part: Mechanism, name: str, behind: Collection[str] = (), later: bool = False) -> bool:
        """Charge one use of a mechanism, before its output is used, on the main rank.

        False if the run has used up what was planned.

        `name` is `charge_name` of all that the output depends on: the same again costs nothing. `behind` are
        the charges of this part that made what the run goes on from. With `later` the charge is on the disk
        after `settle`, without which nothing that follows from the output may leave the process.
        """
        # Methods without noise are marked in the ledger as a whole; single uses mean nothing.
        if not part.noise_multiplier:
            return True
        assert self.ledger is not None  # the main rank charges
        allowed = self.ledger.charge(
            self.run, part.stage, part.composition.single, name, part.composition.count, behind, later
        )
        if not later:
            self.keep_head()
        return allowed

    def settle(self) -> None:
        """Bring all charges to the disk; on ranks without the ledger there is nothing to do."""
        if self.ledger is not None:
            self.ledger.settle()
            self.keep_head()

    def charge_once(self, part: Mechanism, name: str, world: World, directory: Path) -> None:
        """Charge the only use of a mechanism; all ranks call it together.

        Raises UserError on all of them if there was another use before.
        """
        if not world.broadcast_object(self.charge(part, name) if world.is_main else None):
            raise UserError(
                f"{directory}: the {part.name} of this run was drawn before, and what came out of it is "
                "lost or was made otherwise;"
                " another would cost more than was promised: choose another run.dir"
            )

    def require_known(self, behind: Mapping[str, Collection[str]], made: Path, world: World) -> None:
        """Refuse to continue from weights made by charges that are not in the ledger; a collective call.

        `behind` are the names of the charges, by stage, and `made` is the file. Raises UserError on all
        ranks, since nothing derived from such weights could be released.
        """
        lost = 0
        if world.is_main and self.private and self.ledger is not None:
            charges = self.ledger.spent.charges
            lost = sum(name not in charges for names in behind.values() for name in names)
        if lost := world.broadcast_object(lost):
            raise UserError(
                f"{made}: {lost} of the charges that made it are not in the ledger of the sensitive set, so "
                "nothing that comes of it could"
                " be released; bring back that ledger, or choose another run.dir"
            )

    def keep_head(self) -> None:
        """Record the state of the ledger, so that an older copy of it is recognised later."""
        assert self.ledger is not None and self.path is not None  # the main rank keeps it
        record = read_json(self.path)
        if record["ledger"]["digest"] != self.ledger.head.digest:
            write_json(self.path, record | {"ledger": record["ledger"] | self.ledger.head.to_dict()})


def charge_name(root: keys.RootKey, *depends_on: bytes) -> bytes:
    """The name of a charge, 16 bytes, from all that the output depends on.

    Without the key it reveals nothing about them.
    """
    return root.derive("charge", digest_of(*depends_on).hex(), length=16)


def merged(*behind: Mapping[str, Collection[str]]) -> Behind:
    """The union of several sets of charges, by stage."""
    stages = dict.fromkeys(stage for one in behind for stage in one)
    return {
        stage: list(dict.fromkeys(name for one in behind for name in one.get(stage, ()))) for stage in stages
    }


def open_account(config: Config, run: RunDir, sensitive: ImageSet, world: World) -> Account:
    """Open, or open again, the account of a run on a sensitive set; all ranks call it together.

    The plan is made once, announced in the ledger against the set's budget, and kept. Raises UserError on all
    ranks if the set is another one than before, if the budget would be exceeded, or if the ledger is not the
    one that the run knows.
    """
    # The main rank opens the account, and tells the others the outcome: either all go on or all refuse.
    account: Account | None = None
    result: Account | UserError | None = None
    if world.is_main:
        try:
            account = _open(config, run, sensitive)
            result = Account(account.run, account.plan, account.root, account.private)
        except UserError as error:
            result = error
    result = world.broadcast_object(result)
    if isinstance(result, UserError):
        raise result
    assert result is not None  # the main rank's
    return account or result


def check(config: Config, run: RunDir, sensitive: ImageSet | None = None) -> None:
    """Raise UserError for what `open_account` would refuse on the main rank, without writing anything.

    For a run that has not begun, this needs the decoded set (`sensitive`).
    """
    # The ledger's folder, or the nearest one above it that exists, must be writable.
    folder, path = ledger_folder(config), account_path(run)
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"privacy.ledger: {folder} cannot be written")
    record = read_account(path) if path.exists() else None
    if record is not None:
        if sensitive is not None:
            _same_set(run, record, sensitive)
        ledger, plan = (
            Ledger(folder, record["fingerprint"], known_head(record)),
            plan_from_dict(record["plan"]),
        )
        grouping = record["grouping"]
    elif sensitive is None:
        return
    else:
        _no_older_ledger(config, folder, sensitive.fingerprint)
        ledger, plan = Ledger(folder, sensitive.fingerprint), _fresh_plan(config, sensitive.count)
        grouping = sensitive.grouping
    run_name, relation = record["run"] if record else "", _relation(plan, grouping)
    ledger.require_room(run_name, _announced(config, plan), _budget(config), plan.accountant, relation)


def _open(config: Config, run: RunDir, sensitive: ImageSet) -> Account:
    # A run that has begun must find the ledger that it knows; a new run begins one where there is none.
    path, record, folder = run.private / account_path(run).name, None, ledger_folder(config)
    fingerprint = sensitive.fingerprint
    if path.exists():
        record = read_account(path)
        _same_set(run, record, sensitive)
        ledger = Ledger(folder, fingerprint, known_head(record))
    else:
        _no_older_ledger(config, folder, fingerprint)
        ledger = Ledger(folder, fingerprint)
    # A copied directory must not go on under the name and the key of its original: both would draw the same
    # noise for different computations.
    if record is not None and (original := _original(run, record["run"], ledger)) is not None:
        record = _apart(run, record, original)
    if record is None:
        plan = _fresh_plan(config, sensitive.count)
        record = {
            "version": VERSION,
            "run": secrets.token_hex(8),
            "fingerprint": fingerprint,
            "grouping": sensitive.grouping,
            "plan": plan.to_dict(),
        }
    plan = plan_from_dict(record["plan"])
    # The plan is announced before it is kept: a crash in between leaves an announcement without a run, which
    # costs nothing and only reserves budget.
    announced, relation = _announced(config, plan), _relation(plan, sensitive.grouping)
    with ledger.announced(record["run"], announced, _budget(config), plan.accountant, relation):
        write_json(path, record | {"ledger": {"path": str(ledger.path.resolve())} | ledger.head.to_dict()})
    ledger.place(record["run"], run.path.resolve())
    # Runs without noise or with a known key are marked in the ledger for good: nothing that follows from them
    # is ever stated to be private.
    fixed = config.privacy.insecure_fixed_key
    if not config.spec.private or fixed is not None:
        ledger.not_private(record["run"])
    root = keys.open_root(key_path(run)) if fixed is None else keys.insecure_fixed(fixed)
    account = Account(record["run"], plan, root, config.spec.private and fixed is None, ledger, path)
    # The head of the ledger is kept with the account, so that an older copy of it is noticed.
    account.keep_head()
    return account


def _same_set(run: RunDir, record: dict, sensitive: ImageSet) -> None:
    if record["fingerprint"] != sensitive.fingerprint or record["grouping"] != sensitive.grouping:
        raise UserError(
            f"{run.path}: the sensitive set, or which of its images belong together, is not what this run "
            "began with; choose another run.dir"
        )


def _fresh_plan(config: Config, count: int) -> PrivacyPlan:
    return make_plan(config, count) if config.spec.private else plan_without_noise(config, count)


def _announced(config: Config, plan: PrivacyPlan) -> dict[str, SampledGaussian]:
    return {one.stage: one.composition for one in plan.mechanisms} if config.spec.private else {}


def _relation(plan: PrivacyPlan, grouping: str) -> Relation:
    return replace(plan.training.relation, grouping=grouping)


def _budget(config: Config) -> tuple[float, float] | None:
    budget = config.privacy.budget
    return (budget.epsilon, budget.delta) if budget else None


def _no_older_ledger(config: Config, folder: Path, fingerprint: str) -> None:
    """What older versions kept beside the run directory must not be forgotten."""
    name = f"{fingerprint[:32]}.jsonl"
    older = config.run.dir.parent / "ledgers" / name
    if older.exists() and not (folder / name).exists():
        raise UserError(
            f"{older}: an older version kept the ledger of this set here; move it to {folder}, or name its "
            "folder in privacy.ledger"
        )


def _original(run: RunDir, name: str, ledger: Ledger) -> Path | None:
    """The directory of which this one is a copy, if the ledger knows its run and it still exists."""
    # A run that was moved is the same run: the old place no longer exists.
    known = ledger.spent.places.get(name)
    if known is None or not Path(known).is_dir() or Path(known).samefile(run.path):
        return None
    try:
        return Path(known) if read_json(account_path(RunDir(Path(known)))).get("run") == name else None
    except UserError:
        return None


def _apart(run: RunDir, record: dict, original: Path) -> dict:
    """Turn a copied run into a separate run.

    It gets another name and key, and keeps the charges that made its present state.
    """
    say(f"{run.path}: a copy of {original}, now a separate run; what both began with counts for both")
    keys.replace(key_path(run))
    return record | {"run": secrets.token_hex(8), "copy_of": record["run"]}
