"""Where each family's private training starts from, what it releases, and how its parts fit together."""

from pathlib import Path

import pytest
import torch
from torch import nn

from privimage.config import Config, load
from privimage.config.seeds import public_seed
from privimage.data.sensitive import ImageDraws
from privimage.distributed import checkpoint
from privimage.distributed.world import World
from privimage.errors import UserError
from privimage.families import family, finetuned_family, pretrained_family
from privimage.families.gan import GanPrivate, GanPublic

TINY = Path(__file__).parent.parent / "tiny.yaml"
ALONE = World(0, 0, 1, 1, torch.device("cpu"))
LABELS = {"diffusion": ("network.label.weight",), "gan": ("label.weight",)}


def settings(method: str, *overrides: str) -> Config:
    return load(TINY, [f"method={method}", "run.dir=unused", *overrides])


def pretrained(config: Config, n_classes: int) -> dict:
    """Weights of a short public training that differ everywhere from fresh ones."""
    training = pretrained_family(config).public_training(config, n_classes, ALONE)
    generator = torch.Generator().manual_seed(3)
    for step in range(4):
        images = torch.randint(0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=generator)
        training.step(images, torch.arange(8) % max(n_classes, 1), step)
    return training.weights() | {"n_classes": n_classes}


def networks(training) -> dict[str, nn.Module]:
    """All networks of a private training."""
    return {"module": training.module} | (
        {"generator": training.generator.network} if isinstance(training, GanPrivate) else {}
    )


@pytest.mark.parametrize(("same", "other"), [("privimage+d", "pdp-diffusion"), ("privimage+g", "dpgan-p")])
@pytest.mark.parametrize("start_from", ["ema", "raw"])
def test_label_embeddings_are_kept_for_the_labels_of_a_selection_and_fresh_for_others(
    same: str, other: str, start_from: str
) -> None:
    """PrivImage pretrains with the sensitive labels.

    Where public labels were others, only the embeddings start anew, in all networks.
    """
    config = settings(same, f"finetune.start_from={start_from}")
    own, label = pretrained(config, 10), LABELS[config.spec.generator]
    sources = {"generator": own[start_from], "module": own.get("discriminator", own[start_from])}
    begun = networks(finetuned_family(config).private_training(config, 10, ALONE, own))
    config = settings(other, f"finetune.start_from={start_from}")
    public = pretrained(config, 34)
    public_sources = {
        "generator": public[start_from],
        "module": public.get("discriminator", public[start_from]),
    }
    again = networks(finetuned_family(config).private_training(config, 10, ALONE, public))
    fresh = networks(finetuned_family(config).private_training(config, 10, ALONE, None))
    for name, network in begun.items():
        for key, value in network.named_parameters():
            assert torch.equal(value, sources[name][key]), key
        found = dict(again[name].named_parameters())
        assert len([key for key in found if key in label]) == 1
        for key, value in found.items():
            assert torch.equal(
                value,
                dict(fresh[name].named_parameters())[key] if key in label else public_sources[name][key],
            ), key


@pytest.mark.parametrize("method", ["pdp-diffusion", "dpgan-p"])
def test_an_unlabelled_sensitive_set_takes_everything_but_the_public_labels(method: str) -> None:
    config = settings(method)
    training = finetuned_family(config).private_training(config, 0, ALONE, pretrained(config, 34))
    losses = training.losses(training.module, *(part.flatten(0, 1) for part in training.losses.probe(3)))
    assert losses.isfinite().all()


@pytest.mark.parametrize("method", ["privimage+d", "privimage+g"])
def test_weights_of_another_network_are_refused(method: str) -> None:
    config = settings(method)
    narrow = settings(method, "model.width=16", "model.gan_width=8")
    with pytest.raises(ValueError, match="those of another network"):
        finetuned_family(config).private_training(config, 10, ALONE, pretrained(narrow, 10))


@pytest.mark.parametrize("method", ["dpdm", "dpgan"])
def test_a_released_state_loads_and_images_belong_to_their_indices(method: str) -> None:
    config = settings(method, "synthesize.sampler_steps=3")
    kind = family(config)
    training = kind.private_training(config, 10, ALONE, None)
    training.after_step(3)
    generator = kind.generator(config, 10)
    generator.load_state_dict(training.weights())
    draws, indices = training.losses.draws, torch.arange(9)
    together = kind.sample(config, generator.eval(), indices % 10, indices, draws)
    alone = kind.sample(config, generator, indices[4:6] % 10, indices[4:6], draws)
    assert together.shape == (9, 1, 8, 8) and together.dtype == torch.uint8
    assert (alone.int() - together[4:6].int()).abs().max() <= 1


@pytest.mark.parametrize("method", ["dpdm", "dpgan"])
def test_every_network_is_counted(method: str) -> None:
    config = settings(method)
    sizes = family(config).sizes(config, 10)
    training = finetuned_family(config).private_training(config, 10, ALONE, None)
    own = {name: sum(p.numel() for p in network.parameters()) for name, network in networks(training).items()}
    assert sizes == (
        {"generator": own["module"]}
        if method == "dpdm"
        else {"generator": own["generator"], "discriminator": own["module"]}
    )


def test_a_size_that_only_the_generator_of_a_warm_start_cannot_make_is_refused_with_one_alone() -> None:
    """36 pixels are three doublings from 4.5, and divide by 4."""
    config = settings("dpdm", "data.resolution=36")
    assert list(family(config).sizes(config, 10)) == ["generator"]
    with pytest.raises(UserError, match=r"data\.resolution"):
        warm = settings("dpdm", "data.resolution=36", "warm.starts=[embedding]")
        family(warm).sizes(warm, 10)


@pytest.mark.parametrize("method", ["privimage+d", "privimage+g"])
def test_a_public_training_goes_on_to_the_bit_from_its_state(method: str, tmp_path: Path) -> None:
    """5 steps, state, 5 more: as 10 without a break, after the state went through a file."""
    config = settings(method)

    def trained(training, begin: int, end: int):
        for step in range(begin, end):
            images = torch.randint(
                0, 256, (8, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(step)
            )
            training.step(images, torch.arange(8) % 10, step)
        return training

    whole, half, resumed = (pretrained_family(config).public_training(config, 10, ALONE) for _ in range(3))
    trained(whole, 0, 10)
    checkpoint.save(tmp_path / "half", trained(half, 0, 5).state())
    resumed.load(checkpoint.load(tmp_path / "half") or {})
    trained(resumed, 5, 10)
    for kind in ("raw", "ema"):
        for name, value in whole.weights()[kind].items():
            assert torch.equal(value, resumed.weights()[kind][name]), name


@pytest.mark.parametrize("method", ["dpdm", "dpgan"])
def test_a_private_training_goes_on_to_the_bit_from_a_checkpoint_between_two_turns(
    method: str, tmp_path: Path
) -> None:
    """A generator's turn comes after steps 3 and 6; the checkpoint is that of step 4.

    Made-up gradients stand for the noised ones.
    """
    config = settings(method)
    whole, half, resumed = (
        finetuned_family(config).private_training(config, 10, ALONE, None) for _ in range(3)
    )

    def trained(training, steps: range):
        for step in steps:
            random = torch.Generator().manual_seed(step)
            for p in training.module.parameters():
                p.grad = torch.randn(p.shape, generator=random)
            training.optimizer.step()
            training.after_step(step)
        return training

    trained(whole, range(1, 8))
    trained(half, range(1, 5))
    checkpoint.save(
        tmp_path / "4",
        half.state() | {"module": half.module.state_dict(), "optimizer": half.optimizer.state_dict()},
    )
    state = checkpoint.load(tmp_path / "4")
    assert state
    resumed.module.load_state_dict(state["module"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.load(state)
    for mine, expected in zip(resumed.losses.probe(4), half.losses.probe(4), strict=True):
        assert torch.equal(mine, expected)  # a GAN's hold images of the generator as it was at step 3
    trained(resumed, range(5, 8))
    for name, network in networks(whole).items():
        for key, value in network.state_dict().items():
            assert torch.equal(value, networks(resumed)[name].state_dict()[key]), key
    assert all(torch.equal(value, resumed.weights()[key]) for key, value in whole.weights().items())


def test_a_gan_trains_both_networks_in_turn_and_learns_two_classes() -> None:
    """One picture a class.

    The discriminator moves every step, the generator every second, and its averaged images come near.
    """
    config = settings("privimage+g", "pretrain.discriminator_steps=2", "pretrain.learning_rate=2e-3")
    training = GanPublic(config, 2, ALONE)
    pictures = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    pictures[0, :, :, :4], pictures[1, :, :4] = 255, 255
    trained = (training.discriminator.module, training.generator.network)

    def distance() -> float:
        return (training.samples().float() - pictures.repeat(5, 1, 1, 1)).abs().mean().item()

    def moved(step: int) -> list[bool]:
        before = [{name: p.detach().clone() for name, p in network.named_parameters()} for network in trained]
        training.step(pictures.repeat(8, 1, 1, 1), torch.arange(16) % 2, step)
        return [
            any(not torch.equal(p, old[name]) for name, p in network.named_parameters())
            for network, old in zip(trained, before, strict=True)
        ]

    start = distance()
    assert [moved(step) for step in range(200)] == [[True, step % 2 == 1] for step in range(200)]
    assert distance() < start / 4
    assert set(training.scalars()) == {"discriminator loss", "generator loss"}
    training.step(pictures, torch.arange(2), 200)
    assert set(training.scalars()) == {"discriminator loss"}


def test_no_random_numbers_of_one_seed_are_those_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents and churn noise of two values of `runtime.seed`: a recipe like seed + step mixes them up."""
    seeds: dict[int, set[int]] = {0: set(), 1: set()}
    draws, normal = ImageDraws(torch.device("cpu")), ImageDraws.normal
    for seed, used in seeds.items():
        config = settings("dpdm", f"runtime.seed={seed}", "synthesize.sampler=heun")

        def noted(self: ImageDraws, number: int, indices: torch.Tensor, size: int, used=used) -> torch.Tensor:
            used.add(number)
            return normal(self, number, indices, size)

        monkeypatch.setattr(ImageDraws, "normal", noted)
        kind = family(config)
        kind.sample(config, kind.generator(config, 10), torch.arange(2), torch.arange(2), draws)
    assert len(seeds[0]) == len(seeds[1]) > 1
    assert not seeds[0] & seeds[1]


def test_a_public_seed_is_of_its_purpose_and_numbers() -> None:
    configs = [settings("dpdm", f"runtime.seed={seed}") for seed in (0, 1, 11)]
    found = [
        public_seed(config, purpose, *numbers)
        for config in configs
        for purpose in ("latents", "churn")
        for numbers in ((), (0,), (1,), (0, 1), (1, 0), (11,), (1, 1))
    ]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)
    assert public_seed(configs[0], "churn", 3) == public_seed(settings("privimage+d"), "churn", 3)


def test_a_compiled_network_learns_the_same_under_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the graphs of torch.compile; code for the CPU is left out, which takes minutes to make."""
    calls = []

    def compiled(module: nn.Module, **how: object) -> None:
        calls.append(how)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager", **how)

    monkeypatch.setattr(nn.Module, "compile", compiled)
    plain, other = (pretrained(settings("privimage+d", f"pretrain.compile={on}"), 10) for on in (False, True))
    assert calls == [{"dynamic": False}]
    for kind in ("raw", "ema"):
        assert plain[kind].keys() == other[kind].keys()
        for name, value in plain[kind].items():
            assert torch.allclose(value, other[kind][name], atol=1e-5), name
