"""The sections of stages that use public images alone: `model`, `query`, `pretrain`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from privimage.config.section import AUTO, Auto, Section, on


class Model(Section):
    """The generator: DDPM++ for diffusion methods, BigGAN for GAN methods."""

    affects = on("pretrain", "warm", "finetune", "match", "evolve", "synthesize", "evaluate")

    width: Auto[Annotated[int, Field(ge=8, le=512)]] = Field(AUTO, description="base width nf of DDPM++")
    multipliers: Auto[Annotated[tuple[int, ...], Field(min_length=1, max_length=6)]] = Field(
        AUTO, description="channel multiplier of each level"
    )
    attention: Auto[tuple[int, ...]] = Field(AUTO, description="resolutions with self-attention")
    gan_width: int = Field(96, ge=8, le=256, description="width of BigGAN's generator and discriminator")


class Query(Section):
    """The semantic query function, trained on public images.

    With labels by classification, without labels by contrastive learning.
    """

    affects = on("query")

    semantics: Literal["labels", "clusters"] = Field(
        "labels",
        description="what images vote for: public classes, or clusters of the network's features",
        json_schema_extra=on("query", "select", "pretrain", "evaluate"),
    )
    clusters: int = Field(
        100,
        ge=2,
        le=10_000,
        description="number of clusters of the public set, by k-means; for semantics clusters",
    )
    network: Auto[Literal["resnet50", "resnet-small"]] = Field(
        AUTO,
        description="resnet50 is the paper's; resnet-small suits 8x8 to 28x28",
        json_schema_extra=on("query", "select", "warm", "classify", "match", "evolve"),
    )
    batch_size: Auto[Annotated[int, Field(ge=1)]] = Field(AUTO, description="images per step, over all ranks")
    steps: Auto[Annotated[int, Field(ge=1)]] = Field(AUTO, description="training steps")
    start_from: Path | None = Field(
        None,
        description="starter to begin with, the folder or its query.safetensors (`privimage starter`); few "
        "steps are then enough",
    )
    learning_rate: Auto[Annotated[float, Field(gt=0)]] = Field(
        AUTO, description="SGD learning rate, cosine schedule, momentum 0.9, weight decay 5e-4"
    )
    validation_fraction: float = Field(
        0.05, gt=0, lt=0.5, description="part of the public set held out to choose the checkpoint"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between validations and checkpoints")


class Pretrain(Section):
    """Pretraining on the selected public images, without privacy cost."""

    affects = on("pretrain")

    engine: Literal["ddp", "deepspeed"] = Field(
        "ddp", description="data parallelism by torch DDP or DeepSpeed ZeRO"
    )
    deepspeed_config: Path | None = Field(
        None, description="DeepSpeed's JSON; unset: ZeRO stage 1 with bf16 on GPUs"
    )
    batch_size: Auto[Annotated[int, Field(ge=1)]] = Field(AUTO, description="images per step, over all ranks")
    steps: Auto[Annotated[int, Field(ge=1)]] = Field(AUTO, description="training steps")
    start_from: Path | None = Field(
        None,
        description="diffusion: starter to begin with, the folder or its diffusion.safetensors",
    )
    learning_rate: Auto[Annotated[float, Field(gt=0)]] = Field(
        AUTO, description="Adam learning rate, no weight decay; of both networks of a GAN"
    )
    discriminator_steps: int = Field(
        5,
        ge=1,
        le=100,
        description="GAN: steps of the discriminator, which `steps` counts, for each step of the generator",
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights, with the ramp (1+n)/(10+n)"
    )
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="diffusion: probability of hiding an image's label"
    )
    recompute: bool = Field(
        False,
        description="diffusion: compute activations again in the backward pass, for large networks",
        json_schema_extra=on("pretrain", "warm"),
    )
    compile: bool = Field(
        False,
        description="diffusion: compile the network (torch.compile), which takes minutes at the start; for "
        "long trainings on GPUs",
    )
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints", json_schema_extra=on())
    log_every: int = Field(
        50,
        ge=1,
        description="steps between lines of the log and points of TensorBoard",
        json_schema_extra=on(),
    )
