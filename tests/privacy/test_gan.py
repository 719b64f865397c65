"""The private step of a GAN.

What the discriminator's gradient is, what bounds it, and that the generator sees nothing sensitive.
"""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privimage.config import Config, load
from privimage.distributed.world import World
from privimage.families.adversary import AdversarialLosses
from privimage.families.gan import GanPrivate
from privimage.models import build_generator, edm
from privimage.models.biggan import d_loss_fake, d_loss_real
from privimage.privacy.gradients import GRADIENTS, clip_and_sum_

TINY = Path(__file__).parent.parent / "tiny.yaml"
ALONE = World(0, 0, 1, 1, torch.device("cpu"))
CONFIG = load(TINY, ["method=dpgan", "run.dir=unused", "finetune.discriminator_steps=1"])
CLASSES, SEED = 10, 77


def fresh(config: Config = CONFIG) -> GanPrivate:
    """A private training whose discriminator is nowhere zero: both hinges and all layers contribute."""
    training = GanPrivate(config, CLASSES, ALONE, None)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in training.module.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator))
    return training


def some_images(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and indices of a made-up sensitive set."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return (
        images,
        torch.randint(0, CLASSES, (count,), generator=generator),
        torch.randperm(1000, generator=generator)[:count],
    )


def clipped_sum(
    training: GanPrivate, batch: tuple[Tensor, Tensor, Tensor], max_grad_norm: float, way: str = "folded"
) -> Tensor:
    """What a private step adds up for a batch before the noise, (P,)."""
    module = copy.deepcopy(training.module)
    gradients = GRADIENTS[way](module)
    total = torch.zeros(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    if len(batch[0]):
        gradients.backward(training.losses, *training.losses.draw(*batch, SEED))
        clip_and_sum_(total, list(module.parameters()), max_grad_norm)
    return total


@pytest.mark.parametrize("way", sorted(GRADIENTS))
@pytest.mark.parametrize("max_grad_norm", [1e9, 0.5])
def test_the_private_gradient_is_the_clipped_sum_of_a_loop_over_single_images(
    way: str, max_grad_norm: float
) -> None:
    """For each image alone: the real hinge plus the hinge of one fake, made alone from its own latent.

    Backward, clip, add.
    """
    training, batch = fresh(), some_images(7)
    generator, module = training.losses.generator, training.module
    total, norms = torch.zeros(sum(p.numel() for p in module.parameters())), []
    for image, label, index in zip(*batch, strict=True):
        latent = training.losses.draws.normal(SEED, index[None], generator.latent_size)
        fake = generator(latent, label[None]).detach()
        loss = d_loss_real(module(edm.to_unit(image)[None], label[None])) + d_loss_fake(
            module(fake, label[None])
        )
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss.sum(), list(module.parameters()))])
        norms.append(flat.norm().item())
        total += flat * min(1.0, max_grad_norm / norms[-1])
    assert 0.5 < min(norms) < 1e9  # one bound clips every image, the other none
    found = clipped_sum(training, batch, max_grad_norm, way)
    assert (found - total).norm() < 1e-4 * total.norm()


def test_a_fake_does_not_depend_on_the_other_images_of_the_batch() -> None:
    """Batch norm in train mode would make it so, and removing one image would then move the gradients of all
    others.
    """
    training, batch = fresh(), some_images(12)
    together = training.losses.draw(*batch, SEED)[0][:, 1]
    for some in ([3], [0, 3, 5], list(range(11, -1, -1))):
        alone = training.losses.draw(*(part[some] for part in batch), SEED)[0][:, 1]
        assert (alone - together[some]).abs().max() < 1e-5
    others = (some_images(12, seed=9)[0], batch[1], batch[2])
    assert torch.equal(training.losses.draw(*others, SEED)[0][:, 1], together)  # nor on what any image shows
    assert (together[1:] - together[:-1]).abs().amax(
        (1, 2, 3)
    ).min() > 1e-3  # and each has a latent of its own


def test_fakes_are_refused_while_the_generator_s_statistics_are_those_of_a_batch() -> None:
    training = fresh()
    training.losses.generator.train()
    with pytest.raises(RuntimeError, match="depend on the others"):
        training.losses.draw(*some_images(3), SEED)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 6),
    st.integers(0, 2**31),
    st.sampled_from([0.01, 1.0, 100.0]),
    st.sampled_from(["noise", "white", "halves"]),
    st.floats(0.01, 100),
)
def test_one_image_more_moves_the_clipped_sum_by_at_most_the_bound(
    others: int, seed: int, max_grad_norm: float, shown: str, louder: float
) -> None:
    training = fresh()
    with torch.no_grad():
        for value in training.module.parameters():
            value.mul_(louder if value.ndim > 1 else 1.0)
    images, labels, indices = some_images(others + 1, seed)
    if shown == "white":
        images[-1] = 255
    elif shown == "halves":
        images[-1, :, :, :4], images[-1, :, :, 4:] = 0, 255
    batch = (images, labels, indices)
    more, less = (
        clipped_sum(training, batch, max_grad_norm),
        clipped_sum(training, tuple(part[:-1] for part in batch), max_grad_norm),
    )  # type: ignore[arg-type]
    rounding = 1e-5 * (more.norm() + less.norm())
    assert (more - less).norm() <= max_grad_norm + rounding


def flat_state(state: dict, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a nested state by path."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        found |= (
            flat_state(value, f"{prefix}{name}/")
            if isinstance(value, dict)
            else {prefix + name: torch.as_tensor(value).clone()}
        )
    return found


def followed(batch: tuple[Tensor, Tensor, Tensor], steps: int = 2) -> dict[str, Tensor]:
    """The generator's state after steps that follow a discriminator which is given, whatever the private
    batches before each of them showed.
    """
    training, weights = fresh(), None
    gradients = GRADIENTS["folded"](training.module)
    for step in range(1, steps + 1):
        weights = {name: value + 0.01 * step for name, value in training.module.state_dict().items()}
        gradients.backward(training.losses, *training.losses.draw(*batch, SEED + step))
        training.module.load_state_dict(weights)
        training.after_step(step)
    released = {f"released {name}": value for name, value in training.weights().items()}
    return (
        flat_state(training.state())
        | flat_state({"fakes from": training.losses.generator.state_dict()})
        | released
    )


def test_the_generator_never_sees_a_sensitive_image() -> None:
    """Given the discriminator's weights, all that belongs to the generator is equal to the bit for sets with
    nothing in common.
    """
    images, labels, indices = some_images(6)
    expected = followed((images, labels, indices))
    for other in (
        (255 - images, labels, indices),
        (torch.zeros_like(images), (labels + 1) % CLASSES, indices + 1000),
        tuple(part[:1] for part in (images, labels, indices)),
    ):
        found = followed(other)  # type: ignore[arg-type]
        assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []


def test_the_generator_s_step_leaves_nothing_in_the_gradients_of_the_discriminator() -> None:
    training = fresh()
    gradients = GRADIENTS["folded"](training.module)
    gradients.backward(training.losses, *training.losses.draw(*some_images(4), SEED))
    before = {name: (p.clone(), p.grad_sample.clone()) for name, p in training.module.named_parameters()}
    assert "generator loss" in training.after_step(1)
    for name, p in training.module.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name][0]) and torch.equal(p.grad_sample, before[name][1])


def test_the_generator_s_step_follows_the_discriminator_that_was_noised() -> None:
    """One step moves the generator up the scores of the given discriminator, and only every
    `discriminator_steps` private steps.
    """
    changed = [
        "finetune.discriminator_steps=3",
        "finetune.generator_batch_size=64",
        "finetune.generator_learning_rate=5e-3",
    ]
    training = fresh(load(TINY, ["method=dpgan", "run.dir=unused", *changed]))
    start = {name: value.clone() for name, value in training.generator.network.state_dict().items()}
    latents, labels = torch.randn(64, training.generator.network.latent_size), torch.arange(64) % CLASSES

    def score() -> float:
        with torch.no_grad():
            return training.module(training.losses.generator(latents, labels), labels).mean().item()

    before = score()
    for step in (1, 2):
        assert training.after_step(step) == {}
    assert all(
        torch.equal(value, start[name]) for name, value in training.generator.network.state_dict().items()
    )
    for step in range(3, 31):
        training.after_step(step)
    assert score() > before + 0.3


def test_the_discriminator_alone_is_trained_by_the_private_optimizer() -> None:
    training = fresh()
    trained = {id(p) for group in training.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in training.module.parameters()}
    assert training.optimizer.defaults["betas"] == (0.5, 0.999)


class Counting(nn.Module):
    """A discriminator whose score of an image is its mean."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return images.mean((1, 2, 3))


def test_the_loss_of_an_image_is_the_sum_of_both_hinges() -> None:
    losses = AdversarialLosses(CONFIG, ALONE, CLASSES, build_generator(CONFIG, CLASSES).eval())
    images, labels, real = losses.draw(*some_images(3), SEED)
    per_copy = losses(Counting(), images.flatten(0, 1), labels.flatten(), real.flatten()).view(3, 2)
    means = images.mean((2, 3, 4))
    assert torch.allclose(per_copy.mean(1), (1 - means[:, 0]) + (1 + means[:, 1]), atol=1e-5)
