"""Fine-tune the generator on the sensitive set by DP-SGD."""

from pathlib import Path
from typing import Any

from privimage.config import Config
from privimage.data.private_store import ImageSet
from privimage.data.sensitive import GroupedSet, SensitiveSet, StepData, residence
from privimage.data.sources import open_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.families import finetuned_family
from privimage.families.base import ImageLosses, PrivateTraining
from privimage.models import parameters
from privimage.privacy.account import Account, Behind, merged, open_account
from privimage.privacy.batching import physical_batch_size
from privimage.privacy.dpsgd import PrivateSteps, Randomness
from privimage.privacy.gradients import GRADIENTS, PerImageGradients
from privimage.privacy.groups import GroupLosses
from privimage.privacy.identity import computation
from privimage.privacy.mechanisms import DPSGD
from privimage.stages.private_curves import PrivateCurves
from privimage.stages.training import weights_of
from privimage.storage.files import read_json, write_json
from privimage.storage.rundir import RunDir
from privimage.telemetry.progress import Progress


def run(config: Config, run_dir: RunDir, world: World) -> dict:
    """Fine-tune the pretrained networks on the sensitive set by DP-SGD.

    Writes finetune/weights.pt with the averaged generator, the number of steps and the charges that made it.
    Losses and clipping rates go to private/tensorboard. Raises UserError if the run has used up its steps,
    and what they made is lost.
    """
    sensitive = open_sensitive(config, "train", world, run_dir.sensitive)
    account = open_account(config, run_dir, sensitive, world)
    plan = account.plan.the(DPSGD)
    n_classes = len(sensitive.classes) if config.data.sensitive.labelled else 0

    # Go on from the last checkpoint, else from the pretrained weights. Both carry the names of the charges
    # that made them; what an unknown charge has made could never be released.
    training, behind = _training(config, run_dir, world, n_classes)
    account.require_known(behind, run_dir.path / str(config.finetuned_from) / "weights.pt", world)
    file = run_dir.stage("finetune") / "checkpoint.pt"
    first, behind = _resumed(file, training, account, behind, world)

    # Each step of this loop is one use of the sensitive set, charged before anything of it is computed; the
    # charge is on the disk before anything that follows from the step is. What follows the step (averages, a
    # GAN's generator) depends on the noised weights alone.
    steps = _steps(config, run_dir, world, account, training, sensitive, behind, first)
    curves = PrivateCurves(config, run_dir, world, account, first)
    with Progress("finetune", plan.steps, first, world.is_main) as bar:
        for statistics in steps:
            step = steps.step
            behind.setdefault(plan.stage, []).append(steps.name)
            bar.advance()
            curves.add(step, training.after_step(step), statistics, bar.rate)

            # All ranks take part in the state of a checkpoint, the main rank writes it. A stop that any rank
            # has seen arrives on all of them with the sum of the gradients.
            saved = step % config.finetune.checkpoint_every == 0 or step == plan.steps or statistics.stop
            if saved or curves.due:
                curves.flush()
            if saved:
                _save(file, training, step, behind, world)
            if statistics.stop and step < plan.steps:
                curves.close()
                raise Stopped(f"finetune: saved at step {step} of {plan.steps}")
    curves.close()

    known = {"n_classes": n_classes, "classes": list(sensitive.classes), "charges": behind}
    _finish(run_dir, training, steps.step, known, world)
    images, size = steps.step * plan.logical_batch_size, parameters(training.module)
    return {"images": images, "steps": steps.step, "physical_batch_size": steps.physical, "parameters": size}


def _finish(run_dir: RunDir, training: PrivateTraining, steps: int, known: dict, world: World) -> None:
    """Write the weights, with what later stages have to know of them.

    The steps end early where the account allows no more. Raises UserError if there was not a single one.
    """
    if not steps:
        raise UserError(
            f"{run_dir.path}: all private steps of this run were made before, and what they made is lost; "
            "choose another run.dir"
        )
    if world.is_main:
        state = {"ema": training.weights(), "steps": steps} | known
        checkpoint.save(run_dir.stage("finetune") / "weights.pt", state)


def _resumed(
    file: Path, training: PrivateTraining, account: Account, behind: Behind, world: World
) -> tuple[int, Behind]:
    """Load the last checkpoint, if there is one; returns the steps made, and all charges behind."""
    state = checkpoint.load(file, world)
    if state is None:
        return 0, behind
    behind = merged(behind, state["charges"])
    account.require_known(behind, file, world)
    training.module.load_state_dict(state["module"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.load(state)
    return state["step"], behind


def _save(file: Path, training: PrivateTraining, step: int, behind: Behind, world: World) -> None:
    """Write a checkpoint; all ranks call it together."""
    state = training.state() | {
        "module": training.module.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "step": step,
        "charges": behind,
    }
    if world.is_main:
        checkpoint.save(file, state)


def _training(
    config: Config, run_dir: RunDir, world: World, n_classes: int
) -> tuple[PrivateTraining, Behind]:
    """The networks with the weights of pretraining or of a warm start, and the charges behind those.

    Fresh ones for methods without either.
    """
    kind, stage = finetuned_family(config), config.finetuned_from
    weights, behind = weights_of(stage, run_dir, world)
    try:
        return kind.private_training(config, n_classes, world, weights), behind
    except ValueError as error:
        raise UserError(f"{run_dir.path / str(stage) / 'weights.pt'}: {error}") from None


def _steps(
    config: Config,
    run_dir: RunDir,
    world: World,
    account: Account,
    training: PrivateTraining,
    sensitive: ImageSet,
    behind: Behind,
    first: int,
) -> PrivateSteps:
    """The private steps from number `first` on."""
    settings, plan = config.finetune, account.plan.the(DPSGD)
    losses, data = _units(config, world, plan, training, sensitive)
    # The main rank's choice counts: devices may differ in free memory, and a batch of another size would
    # round otherwise.
    physical = world.broadcast_object(
        physical_batch_size(
            settings, training.module, losses, losses.probe, world.device, world.size, plan.per_group
        )
    )
    gradients, digest = _gradients(config, run_dir, world, account, training, losses, sensitive, physical)

    def charge(name: str) -> bool:
        return account.charge(plan, name, behind.get(plan.stage, ()), later=_shares_writes(world))

    return PrivateSteps(
        plan,
        gradients,
        losses,
        training.optimizer,
        data,
        world,
        Randomness(account.root, config.privacy.noise_source, digest),
        physical=physical,
        charge=charge,
        state=training.seen,
        first=first,
        stop_requested=lambda: stop.requested,
    )


def _units(
    config: Config, world: World, plan: DPSGD, training: PrivateTraining, sensitive: ImageSet
) -> tuple[ImageLosses | GroupLosses, StepData]:
    """The losses of the units of the promise, and the set of these units: images, or groups of them."""
    where = residence(config.data.sensitive.residence, sensitive.images, world.device, world.local_size)
    images = SensitiveSet(sensitive.images, sensitive.labels, world.device, where)
    if plan.relation.unit == "image":
        return training.losses, images
    groups = GroupedSet(images, sensitive.groups, plan.per_group)
    return GroupLosses(training.losses, plan.per_group), groups


def _shares_writes(world: World) -> bool:
    """Whether charges wait for the next write of curves or of a checkpoint.

    On GPUs a step may be faster than a disk. On CPUs, where a restart repeats lost steps to the bit, the
    ledger has each of them before it is computed.
    """
    return world.device.type == "cuda"


def _gradients(
    config: Config,
    run_dir: RunDir,
    world: World,
    account: Account,
    training: PrivateTraining,
    losses: ImageLosses | GroupLosses,
    sensitive: ImageSet,
    physical: int,
) -> tuple[PerImageGradients, bytes]:
    """Per-image gradients, and the digest of everything that a step depends on beside its weights.

    Each convolution uses its fastest backend; the choice is recorded, so that a restart repeats its
    predecessor to the bit.
    """

    def digest(**more: dict) -> bytes:
        stage_values: dict[str, Any] = {
            "plan": account.plan.to_dict(),
            "physical_batch_size": physical,
        } | more
        return computation(
            world, account.root, sensitive.content, config, "finetune", stage_values, each_rank=True
        )

    # Backends are part of the identity of a step. They are looked up under the digest of everything else, so
    # that a run on another machine times them again.
    path, without = run_dir.stage("finetune") / "kernels.json", digest().hex()
    record = read_json(path) if world.is_main and path.exists() else {}
    backends = world.broadcast_object(record["backends"] if record.get("computation") == without else {})
    gradients = GRADIENTS[config.finetune.gradients](training.module, backends, filled_to=physical)
    # A backward pass on grey images lets each convolution that has no backend yet time its own.
    gradients.backward(losses, *losses.probe(physical))
    gradients.convolutions.choices = world.broadcast_object(gradients.choices)
    gradients.clear()
    if world.is_main and record.get("computation") != without:
        write_json(path, {"computation": without, "backends": gradients.choices})
    return gradients, digest(backends=gradients.choices)
