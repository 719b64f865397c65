"""Fine-tune the generator on the sensitive set with DP-SGD."""

from dataclasses import replace

from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch.utils.data import DataLoader

from privimage.config import Config
from privimage.curves import Curves, memory
from privimage.data.sensitive import SensitiveSet
from privimage.data.sources import read_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.families import family
from privimage.families.base import PrivateTraining
from privimage.models import parameters
from privimage.privacy.account import Account, open_account
from privimage.privacy.accounting import epsilon
from privimage.privacy.attempts import Attempt, kept_arrangement
from privimage.privacy.batching import physical_batch_size
from privimage.privacy.gradients import GRADIENTS, PerImageGradients
from privimage.privacy.noise import NoiseStream
from privimage.privacy.optimizer import PrivateOptimizer
from privimage.privacy.sampling import PoissonBatches
from privimage.progress import Progress
from privimage.rundir import RunDir


def run(config: Config, run: RunDir, world: World) -> dict:
    """T private steps: Poisson sample, per-image gradients averaged over an image's copies, clip, sum, noise, update.

    Writes finetune/weights.pt with the averaged generator. Losses and clipping rates go to private/tensorboard.
    """
    settings = config.finetune
    sensitive = read_sensitive(config, "train")
    account = open_account(config, run, sensitive.fingerprint, len(sensitive.images), world.broadcast_object, world.is_main)
    plan = account.plan.finetune
    n_classes = len(sensitive.classes) if config.data.sensitive.labelled else 0
    training = _training(config, run, world, n_classes)
    data = SensitiveSet(sensitive.images, sensitive.labels, world.device)

    file, step = run.stage("finetune") / "checkpoint.pt", 0
    state = checkpoint.load(file, world.device)
    step = state["step"] if state else 0
    module, losses = training.module, training.losses
    physical = world.broadcast_object(physical_batch_size(settings, module, losses, losses.probe, world.device, world.size))
    gradients, attempt = _arranged(config, run, world, account, training, physical, step)
    if state:
        module.load_state_dict(state["module"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.load(state)

    source = config.privacy.noise_source
    deviation = plan.rank_deviation(world.size)
    size = parameters(module)
    noise = NoiseStream(account.root, source, size, deviation, world.rank, attempt.number) if deviation else None

    def charge(at: int) -> None:
        if world.is_main:
            account.charge_step(attempt.number, at)

    private_optimizer = PrivateOptimizer(training.optimizer, plan, world, noise, step, charge, lambda: stop.requested)
    steps = range(step, attempt.last)
    batches = PoissonBatches(account.root, source, attempt.number, plan.count, plan.sample_rate, steps, world.rank, world.size)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=lambda batch: batch)
    curves = Curves(run.tensorboard, "finetune", step, world.is_main)
    private_curves = Curves(run.private / "tensorboard", "finetune", step, world.is_main)
    before = (account.plan.query.mechanism,) if account.plan.query else ()
    with (
        Progress("finetune", attempt.last, step, world.is_main) as bar,
        BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=private_optimizer) as physical_batches,
    ):
        for images, labels, indices in physical_batches if steps else ():
            if len(images):
                seed = int.from_bytes(account.root.derive("finetune draws", attempt.number, step, length=8), "big")
                private_optimizer.count_losses(gradients.backward(losses, *losses.draw(images, labels, indices, seed)))
            if not private_optimizer.step():
                continue
            step += 1
            bar.advance()
            figures = private_optimizer.figures
            assert figures is not None  # a logical batch was completed
            shown = training.after_step(step) | {"memory": memory(world.device), "learning rate": settings.learning_rate}
            if account.private and (step % max(1, plan.steps // 20) == 0 or step == attempt.last) and world.is_main:
                charged = replace(plan.mechanism, count=plan.steps - (attempt.last - step))
                shown["epsilon"] = epsilon((*before, charged), account.plan.delta, account.plan.accountant, 1e-3)
            curves.scalars(step, shown)
            private_curves.scalars(
                step,
                {
                    "loss": figures.loss_sum / max(figures.images, 1),
                    "clipped": figures.clipped / max(figures.images, 1),
                    "non-finite": figures.non_finite,
                    "images": figures.images,
                    "mean norm": figures.norm_sum / max(figures.images, 1),
                    "images per second": bar.rate * plan.logical_batch_size,
                },
            )
            if step % settings.checkpoint_every == 0 or step == attempt.last or figures.stop:
                curves.flush()
                private_curves.flush()
                state = training.state() | {"module": module.state_dict(), "optimizer": training.optimizer.state_dict(), "step": step}
                if world.is_main:
                    checkpoint.save(file, state)
            if figures.stop and step < attempt.last:
                if noise:
                    noise.close()
                curves.close()
                private_curves.close()
                raise Stopped(f"finetune: saved at step {step} of {attempt.last}")
    if noise:
        noise.close()
    if world.is_main:
        checkpoint.save(run.stage("finetune") / "weights.pt", {"ema": training.weights(), "n_classes": n_classes, "classes": list(sensitive.classes)})
    curves.close()
    private_curves.close()
    return {"images": step * plan.logical_batch_size, "steps": step, "attempts": attempt.number + 1, "physical_batch_size": physical, "parameters": size}


def _training(config: Config, run: RunDir, world: World, n_classes: int) -> PrivateTraining:
    """The networks with the pretrained weights, or fresh ones for methods without pretraining."""
    kind = family(config)
    if config.spec.pretraining == "none":
        return kind.private_training(config, n_classes, world, None)
    run.require("pretrain")
    path = run.stage("pretrain") / "weights.pt"
    pretrained = checkpoint.required(path, "pretrain", world.device)
    try:
        return kind.private_training(config, n_classes, world, pretrained)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _arranged(
    config: Config, run: RunDir, world: World, account: Account, training: PrivateTraining, physical: int, step: int
) -> tuple[PerImageGradients, Attempt]:
    """The gradients' way through each layer and the attempt to go on with: the same on all ranks."""
    path, way = run.private / "attempts.json", config.finetune.gradients
    own = {"physical_batch_size": physical}
    inputs = [] if config.spec.pretraining == "none" else [run.stage("pretrain") / "weights.pt"]
    arrangement = account.arrangement(config, world, inputs) | own
    kept = kept_arrangement(path) if world.is_main else {}
    same = {name: value for name, value in kept.items() if name != "backends"} == arrangement
    filled_to = physical if world.device.type == "cuda" else min(physical, 2)  # on a CPU only the kernels for one image differ
    gradients = GRADIENTS[way](training.module, world.broadcast_object(kept["backends"] if same else {}), filled_to)
    gradients.backward(training.losses, *training.losses.probe(physical))  # finds the fastest way for each layer that has none yet
    gradients.convolutions.choices = world.broadcast_object(gradients.choices)
    gradients.set_grad_sample_to_none()
    attempt = account.resume_training(path, arrangement | {"backends": gradients.choices}, step) if world.is_main else None
    return gradients, world.broadcast_object(attempt)
