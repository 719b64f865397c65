"""The interface of a family of generators: training in public and in private, and sampling."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from privimage.config import Config
from privimage.data.sensitive import ImageDraws
from privimage.distributed.world import World, alone
from privimage.families.work import FEW, Work, seconds_an_image
from privimage.models import parameters
from privimage.models.label_features import LabelClassifier
from privimage.privacy.batching import bytes_of_an_image, cpu_batch_size
from privimage.privacy.gradients import GRADIENTS, clip_and_sum_, trained_parameters
from privimage.privacy.plan import PrivacyPlan


class PublicTraining(ABC):
    """Pretraining of a family's networks, by all ranks together."""

    operations: float = 0.0  # floating-point operations per image of a step; 0: not counted

    @abstractmethod
    def step(self, images: Tensor, labels: Tensor, step: int) -> None:
        """Take in this rank's part of the batch of a step: images uint8 (B, C, H, W), labels int64 (B,).

        Repeatable: it depends on nothing else.
        """

    @abstractmethod
    def scalars(self) -> dict[str, float]:
        """Means of the losses over the steps since the last call and over the ranks, for TensorBoard.

        All ranks must call it together.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; all ranks must call it together, any of them may write it."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, on all ranks, before the first step."""

    @abstractmethod
    def samples(self) -> Tensor:
        """A few images from the averaged generator, uint8 (N, C, H, W), for TensorBoard.

        One rank may call it alone.
        """

    @abstractmethod
    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The generator's state as `raw` and, averaged, as `ema`, and whatever else later stages need."""


class ImageLosses(ABC):
    """The losses of sensitive images, each a function of one image and of random numbers that belong to it
    and to the step.
    """

    def __init__(self, config: Config, world: World, n_classes: int):
        self.n_classes, self.device, self.shape = n_classes, world.device, image_shape(config)
        self.bf16 = config.finetune.precision == "bf16"
        self.draws = ImageDraws(world.device)

    @abstractmethod
    def draw(self, images: Tensor, labels: Tensor, indices: Tensor, seed: int) -> tuple[Tensor, ...]:
        """Images uint8 (B, C, H, W), labels and indices (B,) -> the tensors of the loss, (B, K, ...) each,
        with K copies of each image.

        Row i depends on images[i], labels[i], indices[i] and the seed, on no other image and on no other row.
        """

    def probe(self, count: int) -> tuple[Tensor, ...]:
        """The tensors (B, K, ...) of `draw` for `count` grey images that are not sensitive, to time and
        measure with.
        """
        images = torch.full((count, *self.shape), 127, dtype=torch.uint8, device=self.device)
        indices = torch.arange(count, device=self.device)
        return self.draw(images, indices % max(self.n_classes, 1), indices, seed=0)

    @abstractmethod
    def __call__(self, module: nn.Module, *tensors: Tensor) -> Tensor:
        """The tensors of `draw`, copies and images in one leading dimension n -> losses (n,).

        An image's loss is the mean over its copies.
        """


class PrivateTraining(ABC):
    """Fine-tuning: `module` is trained by private steps, other networks from its noised weights alone."""

    module: nn.Module  # the only network that sees sensitive images
    losses: ImageLosses

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """That of `module`, built when it is asked for: `plan`, which takes no step, would wait a second for
        what it imports.
        """

    def seen(self) -> list[Tensor]:
        """All tensors that per-image gradients depend on: `module`, and other networks in the losses."""
        return list(self.module.state_dict().values())

    @abstractmethod
    def after_step(self, step: int) -> dict[str, float]:
        """What follows the `step`-th private update (1, 2, ...) of `module` and sees nothing sensitive but
        its weights.

        All ranks call it together. Returns scalars that may be shown beside the public ones.
        """

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside `module` and `optimizer`; all ranks must call it together."""

    @abstractmethod
    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, on all ranks, after `module` and `optimizer` were restored.

        Other keys are left alone.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The state dict of the averaged generator, which is released."""


class Family(ABC):
    """One kind of generator. `n_classes` is 0 for an unlabelled set.

    A family that can be pretrained on public images is also `Pretrained`, one that can be fine-tuned by
    DP-SGD also `FineTuned`.
    """

    releases_model: ClassVar[bool] = True  # whether its network is released with the images

    @abstractmethod
    def networks(self, config: Config, n_classes: int) -> dict[str, nn.Module]:
        """All networks by name, with fresh weights. Raises UserError for settings that do not fit."""

    @abstractmethod
    def generator(self, config: Config, n_classes: int) -> nn.Module:
        """The network that makes images, with fresh weights; it loads the states that trainings leave."""

    @abstractmethod
    def architecture(self, config: Config, n_classes: int) -> tuple[str, dict[str, Any]]:
        """Name and arguments from which `privimage.models.built` builds the generator again."""

    @abstractmethod
    def sampling(self, config: Config) -> dict[str, Any]:
        """What a sampler has to know beside the generator, as plain values."""

    def guided(self, config: Config, generator: nn.Module, classifier: LabelClassifier) -> nn.Module:
        """The generator as it makes images where there is a private classifier; `sample` takes either."""
        return generator

    def restored(self, config: Config, state: dict[str, Any]) -> nn.Module:
        """The generator that a stage left in `state`: its weights as `ema`, and `n_classes`."""
        generator = self.generator(config, state["n_classes"])
        generator.load_state_dict(state["ema"])
        return generator

    @abstractmethod
    def sample(
        self, config: Config, generator: nn.Module, labels: Tensor | None, indices: Tensor, draws: ImageDraws
    ) -> Tensor:
        """The images at `indices` (B,) of an endless synthetic set, uint8 (B, C, H, W).

        `labels` are int64 (B,), or None for an unlabelled set. The random numbers of an image come from
        `runtime.seed` and its index.
        """

    @abstractmethod
    def work(self, config: Config, plan: PrivacyPlan, n_classes: int, device: torch.device) -> list[Work]:
        """Estimate of time and memory of training and synthesis, from a short measurement on `device`."""

    def sizes(self, config: Config, n_classes: int) -> dict[str, int]:
        """The number of parameters of each network, by name."""
        # Real weights, soon forgotten: what an embedding needs on the meta device takes seconds to load.
        with torch.random.fork_rng(devices=[]):
            return {name: parameters(network) for name, network in self.networks(config, n_classes).items()}


class Pretrained(ABC):
    """A family that stage `pretrain` trains on public images."""

    engines: ClassVar[tuple[str, ...]] = ("ddp", "deepspeed")  # values of pretrain.engine that it supports

    @abstractmethod
    def public_training(
        self, config: Config, n_classes: int, world: World, start: dict[str, Tensor] | None = None
    ) -> PublicTraining:
        """Fresh networks, or those of a starter's weights (diffusion), equal on all ranks; `pretrain.engine`
        is one of `engines`.
        """


class WarmTraining(PublicTraining):
    """Training on images of warm starts, and on public ones."""

    @abstractmethod
    def step(
        self, images: Tensor, labels: Tensor, step: int, below: tuple[Tensor, Tensor] | None = None
    ) -> None:
        """See `PublicTraining.step`; `below`, as many images and labels as these, takes their place at noise
        levels below `warm.sigma_min`.
        """


class Warmed(ABC):
    """A family that stage `warm` trains on images that follow from noisy statistics."""

    @abstractmethod
    def warm_training(
        self, config: Config, n_classes: int, world: World, pretrained: dict | None
    ) -> WarmTraining:
        """Networks that start from the `weights` of public training, or fresh ones; equal on all ranks."""


class FineTuned(ABC):
    """A family that stage `finetune` trains on sensitive images by DP-SGD."""

    @abstractmethod
    def private_training(
        self, config: Config, n_classes: int, world: World, pretrained: dict | None
    ) -> PrivateTraining:
        """Networks that start from the `weights` of public training, or fresh ones; equal on all ranks.

        Label embeddings are fresh in any case where the public labels were others than the sensitive ones.
        Raises ValueError for the weights of other networks.
        """

    def _private_seconds(self, config: Config, n_classes: int, device: torch.device) -> float:
        """Seconds per image of a private step on `device`, without noise and update, measured briefly."""
        training = self.private_training(config, n_classes, alone(device), None)
        losses = training.losses
        held = bytes_of_an_image(training.module, losses, losses.probe, device)
        at_once = cpu_batch_size(config.finetune, held)
        # Longer than other parts: most of the time of a run is theirs, and few at once take longer each.
        return seconds_an_image(step_on_grey(config, training), min(FEW, at_once), at_once, patience=3.3)


def step_on_grey(config: Config, training: PrivateTraining) -> Callable[[int], Tensor]:
    """A function of n: a private step on n grey images, without noise and update, to time.

    Its gradients are computed, clipped and summed as those of sensitive images are.
    """
    gradients, losses = GRADIENTS[config.finetune.gradients](training.module), training.losses
    trained = trained_parameters(training.module)
    size = sum(parameter.numel() for parameter in trained)
    gradient_sum = torch.zeros(size, device=losses.device, dtype=torch.float64)

    def step(images: int) -> Tensor:
        gradients.backward(losses, *losses.probe(images))
        return clip_and_sum_(gradient_sum, trained, config.finetune.max_grad_norm)[0]

    return step


def image_shape(config: Config) -> tuple[int, int, int]:
    """Channels, height and width of the images of a configuration."""
    return config.data.channels, config.data.resolution, config.data.resolution


def load_pretrained(module: nn.Module, weights: dict[str, Tensor], fresh: str | None) -> None:
    """Load a pretrained state dict into `module`; the parameter named `fresh` keeps its own value.

    Raises ValueError for names or shapes of another network.
    """
    # Names and shapes must agree but for the embedding that is to be fresh.
    fresh_state = module.state_dict()
    taken = {name: value for name, value in weights.items() if name != fresh}
    if taken.keys() != fresh_state.keys() - {fresh} or any(
        value.shape != fresh_state[name].shape for name, value in taken.items()
    ):
        raise ValueError("the weights are those of another network")
    module.load_state_dict(fresh_state | taken)
