"""Fine-tune the generator on the sensitive set with DP-SGD: the second place that spends privacy."""

import platform
import secrets
from dataclasses import replace

import torch
from opacus.utils.batch_memory_manager import BatchMemoryManager
from torch import Tensor, nn
from torch.utils.data import DataLoader

from privimage.config import Config
from privimage.curves import Curves, memory
from privimage.data.sensitive import ImageDraws, SensitiveSet, dropped
from privimage.data.sources import read_sensitive
from privimage.distributed import checkpoint
from privimage.distributed.preemption import stop
from privimage.distributed.world import World
from privimage.errors import Stopped, UserError
from privimage.models import build_diffusion, edm
from privimage.models.ema import EMA
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
    """T private steps: Poisson sample, per-image gradients averaged over K noise copies, clip, sum, noise, update.

    Writes finetune/weights.pt with the averaged weights. Losses and clipping rates go to private/tensorboard.
    """
    settings = config.finetune
    sensitive = read_sensitive(config, "train")
    account = open_account(config, run, sensitive.fingerprint, len(sensitive.images), world.broadcast_object, world.is_main)
    plan = account.plan.finetune
    n_classes = len(sensitive.classes) if config.data.sensitive.labelled else 0
    denoiser = start_weights(config, run, world, n_classes)
    data = SensitiveSet(sensitive.images, sensitive.labels, world.device)

    file, step = run.stage("finetune") / "checkpoint.pt", 0
    state = checkpoint.load(file, world.device)
    step = state["step"] if state else 0
    losses = ImageLosses(config, world, n_classes)
    physical = world.broadcast_object(physical_batch_size(settings, denoiser, losses, losses.probe, world.device))
    gradients, attempt = _arranged(config, run, world, account, denoiser, losses, physical, step)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=settings.learning_rate)
    ema = EMA(denoiser, settings.ema_decay)
    if state:
        denoiser.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])

    source = config.privacy.noise_source
    deviation = plan.rank_deviation(world.size)
    size = sum(p.numel() for p in denoiser.parameters())
    noise = NoiseStream(account.root, source, size, deviation, world.rank, attempt.number) if deviation else None

    def charge(at: int) -> None:
        if world.is_main:
            account.charge_step(attempt.number, at)

    private_optimizer = PrivateOptimizer(optimizer, plan, world, noise, step, charge, lambda: stop.requested)
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
            ema.update()
            step += 1
            bar.advance()
            figures = private_optimizer.figures
            assert figures is not None  # a logical batch was completed
            shown = {"memory": memory(world.device), "learning rate": settings.learning_rate}
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
                if world.is_main:
                    state = {"module": denoiser.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict(), "step": step}
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
        checkpoint.save(run.stage("finetune") / "weights.pt", {"ema": ema.state_dict()["averages"], "n_classes": n_classes, "classes": list(sensitive.classes)})
    curves.close()
    private_curves.close()
    return {"images": step * plan.logical_batch_size, "steps": step, "attempts": attempt.number + 1, "physical_batch_size": physical, "parameters": size}


class ImageLosses:
    """EDM's loss of K noised copies of each image; all random numbers belong to (step, image)."""

    def __init__(self, config: Config, world: World, n_classes: int):
        self.copies, self.label_dropout = config.finetune.noise_copies, config.finetune.label_dropout
        self.n_classes, self.device = n_classes, world.device
        self.bf16 = config.finetune.precision == "bf16"
        self.shape = (config.data.channels, config.data.resolution, config.data.resolution)
        self.draws = ImageDraws(world.device)

    def draw(self, images: Tensor, labels: Tensor, indices: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) -> images, labels, sigma and noise with K copies each: (B, K, ...)."""
        count, copies, pixels = len(images), self.copies, images[0].numel()
        normal = self.draws.normal(seed, indices, 1 + copies * (1 + pixels))
        hidden = dropped(normal[:, 0], self.label_dropout)
        sigma = edm.draw_sigma(normal[:, 1 : 1 + copies])
        noise = normal[:, 1 + copies :].view(count, copies, *self.shape)
        kept = torch.where(hidden, self.n_classes, labels)
        return edm.to_unit(images)[:, None].expand(-1, copies, -1, -1, -1), kept[:, None].expand(-1, copies), sigma, noise

    def probe(self, count: int) -> tuple[Tensor, ...]:
        """A batch of the right shapes without sensitive images, to time and measure with."""
        images = torch.full((count, *self.shape), 127, dtype=torch.uint8, device=self.device)
        indices = torch.arange(count, device=self.device)
        return self.draw(images, indices % max(self.n_classes, 1), indices, seed=0)

    def __call__(self, module: nn.Module, images: Tensor, labels: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            return edm.loss(module, images, labels if self.n_classes else None, sigma, noise)


def start_weights(config: Config, run: RunDir, world: World, n_classes: int) -> nn.Module:
    """The network with the pretrained weights, or fresh ones for methods without pretraining.

    Where the public labels were others than the sensitive ones, the label embedding is re-initialised.
    """
    torch.manual_seed(config.runtime.seed)
    denoiser = build_diffusion(config, n_classes).to(world.device)
    if config.spec.pretraining == "none":
        return denoiser
    run.require("pretrain")
    path = run.stage("pretrain") / "weights.pt"
    state = checkpoint.load(path, world.device)
    if state is None:
        raise UserError(f"{path}: no such file; run `privimage pretrain` first")
    weights = state[config.finetune.start_from]
    if config.spec.pretraining == "all":
        weights = {name: value for name, value in weights.items() if not name.endswith("network.label.weight")}
    missing, unexpected = denoiser.load_state_dict(weights, strict=False)
    if unexpected or (set(missing) - {"network.label.weight"}):
        raise UserError(f"{path}: its weights are those of another network")
    return denoiser


def _arranged(
    config: Config, run: RunDir, world: World, account: Account, denoiser: nn.Module, losses: ImageLosses, physical: int, step: int
) -> tuple[PerImageGradients, Attempt]:
    """The gradients' way through each layer and the attempt to go on with: the same on all ranks."""
    path, way = run.private / "attempts.json", config.finetune.gradients
    cuda = world.device.type == "cuda"
    arrangement = {
        "ranks": world.size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(world.device) if cuda else platform.machine(),
        "restart": secrets.token_hex(8) if cuda else "",  # sums on a GPU need not repeat to the bit: each start is an attempt of its own
        "torch": torch.__version__,
        "physical_batch_size": physical,
        "precision": config.finetune.precision,
        "gradients": way,
        "key": account.root.name,
    }
    kept = kept_arrangement(path) if world.is_main else {}
    same = {name: value for name, value in kept.items() if name != "backends"} == arrangement
    gradients = GRADIENTS[way](denoiser, world.broadcast_object(kept["backends"] if same else {}))
    gradients.backward(losses, *losses.probe(physical))  # finds the fastest way for each layer that has none yet
    gradients.convolutions.choices = world.broadcast_object(gradients.choices)
    gradients.set_grad_sample_to_none()
    attempt = account.resume_training(path, arrangement | {"backends": gradients.choices}, step) if world.is_main else None
    return gradients, world.broadcast_object(attempt)
