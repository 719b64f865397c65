"""One run's account: its plan, its key, its identity in the ledger of the sensitive set, and the statement that is released."""

import math
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from privimage.config import Config
from privimage.errors import UserError
from privimage.privacy import keys
from privimage.privacy.accounting import Mechanism, epsilon
from privimage.privacy.attempts import Attempt, arranged, resume_attempt
from privimage.privacy.ledger import Ledger, charge_name
from privimage.privacy.optimizer import Ranks
from privimage.privacy.plan import FinetunePlan, PrivacyPlan, QueryPlan, make_plan, plan_from_dict
from privimage.rundir import RunDir, read_json, write_json


@dataclass(frozen=True)
class Account:
    """Opened by each stage that draws outputs from sensitive data, on every rank; only the main rank charges."""

    name: str  # the run, in the ledger
    plan: PrivacyPlan
    root: keys.RootKey
    ledger: Ledger
    private: bool  # false for methods without noise and for fixed keys: what comes out is then not private

    def charge(self, mechanism: Mechanism, identity: str) -> None:
        """Charge one use of a mechanism, before its output is used; the same identity again costs nothing."""
        if mechanism.noise_multiplier > 0:
            self.ledger.charge(self.name, mechanism, identity)

    def charged(self, mechanism: Mechanism, without: Iterable[str] = ()) -> int:
        """How often this run has been charged for `mechanism`, leaving out the charges with the identities in `without`."""
        left_out = {charge_name(self.name, identity) for identity in without}
        charges = self.ledger.read().charges.items()
        return sum(run == self.name and m.single == mechanism.single and name not in left_out for name, (run, m) in charges)

    def charge_step(self, attempt: int, step: int) -> None:
        """Charge one step of the training, before its output is used; a replay of it in the same attempt costs nothing."""
        self.charge(self.plan.training.mechanism.single, self._step_identity(attempt, step))

    def arrangement(self, config: Config, world: Ranks, inputs: Iterable[Path] = ()) -> dict:
        """What the training's outputs depend on beside the sensitive set; see `attempts.arranged`. All ranks call it together."""
        tree = config.model_dump(mode="json", exclude={"run", "slurm", "synthesize", "evaluate"})
        tree["runtime"] = {name: tree["runtime"][name] for name in ("seed", "precision")}
        tree["data"].pop("workers")
        return arranged(world, self.root, tree, inputs)

    def resume_training(self, path: Path, arrangement: dict, step: int) -> Attempt:
        """The attempt in which the training goes on from a checkpoint at `step`; `path` keeps the attempts of the run."""
        planned = self.plan.training.mechanism

        def charged_elsewhere(number: int) -> int:
            return self.charged(planned, without=(self._step_identity(number, at) for at in range(planned.count)))

        return resume_attempt(path, arrangement, step, planned.count, charged_elsewhere)

    def _step_identity(self, attempt: int, step: int) -> str:
        return f"step|{self.root.name}|{attempt}|{step}"


def ledger_folder(config: Config) -> Path:
    """Where the ledgers are kept: shared by all runs, beside the run directory unless told otherwise."""
    return config.privacy.ledger or config.run.dir.parent / "ledgers"


def key_path(run: RunDir) -> Path:
    """Where the secret key of a run is kept until it is finished."""
    return run.private / "root.key"


def open_account(config: Config, run: RunDir, fingerprint: str, count: int, broadcast: Callable, is_main: bool) -> Account:
    """Open, or open again, the account of a run on a sensitive set of `count` images with the given fingerprint.

    The plan is made once, announced in the ledger against the set's budget, and kept. `broadcast` gives all ranks the main
    rank's object. Raises UserError on all ranks if the set is another one than before or the budget would be exceeded.
    """
    result: Account | UserError | None = None
    if is_main:
        try:
            result = _open(config, run, fingerprint, count)
        except UserError as error:
            result = error
    result = broadcast(result)
    if isinstance(result, UserError):
        raise result
    return result


def _open(config: Config, run: RunDir, fingerprint: str, count: int) -> Account:
    ledger = Ledger(ledger_folder(config), fingerprint)
    path, private = run.private / "account.json", config.spec.private
    if path.exists():
        kept = read_json(path)
        if kept["fingerprint"] != fingerprint:
            raise UserError(f"{run.path}: the sensitive set is not the one that this run began with; choose another run.dir")
        plan = plan_from_dict(kept["plan"])
    else:
        plan = make_plan(config, count) if private else plan_without_noise(config, count)
        kept = {"run": secrets.token_hex(8), "fingerprint": fingerprint, "ledger": str(ledger.path.resolve()), "plan": plan.to_dict()}
        write_json(path, kept)
    fixed = config.privacy.insecure_fixed_key
    root = keys.open_root(key_path(run)) if fixed is None else keys.insecure_fixed(fixed)
    if private:
        budget = config.privacy.budget
        ledger.announce(kept["run"], plan.mechanisms, (budget.epsilon, budget.delta) if budget else None, plan.accountant)
    if not private or fixed is not None:
        ledger.not_private(kept["run"])
    return Account(kept["run"], plan, root, ledger, private and fixed is None)


def plan_without_noise(config: Config, count: int) -> PrivacyPlan:
    """The steps of a method without noise or clipping, in the form of a plan."""
    settings = config.finetune
    finetune = FinetunePlan(count, min(settings.logical_batch_size, count), settings.steps, 0.0, math.inf, config.noise_copies)
    query = QueryPlan(config.select.per_image, 0.0) if config.spec.pretraining == "selected" else None
    return PrivacyPlan(math.inf, 1.0, config.privacy.accountant, query, finetune)


def statement(config: Config, account: Account, versions: dict[str, str]) -> dict:
    """What PRIVACY.json says: from the ledger, not from the plan. Raises UserError if the ledger lacks what was used."""
    plan, settings = account.plan, config.privacy
    head = {"method": config.method, "private": account.private, "neighbours": "add or remove one image", "accountant": plan.accountant}
    tail = {"noise_source": settings.noise_source, "cryptographic_noise": settings.noise_source != "insecure-philox", "versions": versions}
    if not account.private:
        why = "a fixed key was used" if config.spec.private else "this method adds no noise"
        return head | {"epsilon": None, "delta": None, "reason": f"not private: {why}", "mechanisms": []} | tail
    for part in plan.parts:
        if account.charged(part.mechanism) < 1:
            raise UserError(f"{account.ledger.path}: the {part.name} of this run is not in the ledger; what came out of it must not be released")
    used = account.ledger.read().mechanisms(account.name)
    spent = epsilon(used, plan.delta, plan.accountant)
    return (
        head
        | {"epsilon": round(math.ceil(spent * 1e4) / 1e4, 4), "delta": plan.delta, "promised_epsilon": plan.epsilon}
        | {"mechanisms": [_described(m, plan) for m in used]}
        | tail
    )


def _described(used: Mechanism, plan: PrivacyPlan) -> dict:
    part = next(part for part in plan.parts if part.mechanism.single == used.single)
    common = {"noise_multiplier": used.noise_multiplier, "sample_rate": used.sample_rate, "count": used.count}
    return {"name": part.name, "mechanism": used.kind} | part.parameters | common


def statement_for_people(said: dict) -> str:
    """PRIVACY.md: the same in words."""
    if not said["private"]:
        return f"# Not private\n\nThis data set is **{said['reason']}**. Do not share it as if it protected anyone.\n"
    lines = [
        "# What this data set promises\n",
        f"It was made by {said['method']} under **({said['epsilon']:g}, {said['delta']:g})-differential privacy** (accountant: {said['accountant']}).",
        "Whether any single image was in the sensitive set or not changes the probability of anything that could be learned from",
        f"this folder by a factor of at most e^{said['epsilon']:g}, but for a probability of {said['delta']:g}.",
        "Neighbouring sets differ by adding or removing one image; a person with several images is protected less.\n",
        "What was drawn from the sensitive set:\n",
        *(
            f"- {m['name']}: {m['mechanism']}, noise multiplier {m['noise_multiplier']:g}, sample rate {m['sample_rate']:.6g}, {m['count']} times"
            for m in said["mechanisms"]
        ),
        f"\nNoise: {said['noise_source']}"
        + ("." if said["cryptographic_noise"] else " - not a cryptographic generator: whoever can guess its state can subtract the noise."),
        "\nThe promise covers this folder alone. Other releases from the same sensitive set add to it; the owner's ledger keeps the sum.\n",
    ]
    return "\n".join(lines)
