"""The sections of stages that draw from the sensitive set: `select` to `match`."""

from typing import Annotated, Literal

from pydantic import Field

from privimage.config.section import AUTO, Auto, Section, on


class Select(Section):
    """The semantic distribution query, which spends privacy."""

    affects = on("select", planned=True)

    per_image: Auto[Annotated[int, Field(ge=1)]] = Field(
        AUTO, description="k1: public classes that each sensitive image votes for"
    )
    per_class: Auto[Annotated[int, Field(ge=1)]] = Field(
        AUTO,
        description="k2: public classes kept for each sensitive class",
        json_schema_extra=on("select"),
    )
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        description="sigma1; unset: the smallest that raises the noise of fine-tuning by at most max_rise",
    )
    max_rise: Auto[Annotated[float, Field(gt=0, le=1)]] = Field(
        AUTO, description="allowed relative rise of the fine-tuning noise when sigma1 is derived"
    )


class Warm(Section):
    """Warm starts of diffusion models, which spend a little privacy before the private steps.

    A few noisy statistics of each class give images with labels, on which the model is trained without
    further cost.
    """

    affects = on("warm")

    starts: tuple[Literal["moments", "embedding", "central"], ...] = Field(
        (),
        description="moments: Gaussian images of noisy means of the classes and a noisy covariance; "
        "embedding: images of a generator that matches the noisy mean embedding (settings of `match`); "
        "central: noisy means of random parts of each class; [] is off",
        json_schema_extra=on("warm", "finetune", planned=True),
    )
    max_rise: Auto[Annotated[float, Field(gt=0, le=1)]] = Field(
        AUTO,
        description="allowed relative rise of the fine-tuning noise by each of `starts`",
        json_schema_extra=on("warm", planned=True),
    )
    coordinates: int = Field(
        64,
        ge=1,
        le=1024,
        description="moments: the lowest frequencies of an image, of which means and covariance are taken",
        json_schema_extra=on("warm", planned=True),
    )
    parts: int = Field(
        5,
        ge=1,
        le=1000,
        description="central: random parts of the sensitive set; each gives one image of each class",
        json_schema_extra=on("warm", planned=True),
    )
    sigma_min: float = Field(
        0.5,
        ge=0,
        le=80,
        description="noise level from which on images of `starts` are trained on; below it those of "
        "pretraining, which have finer details, if there are any",
    )
    batch_size: int = Field(64, ge=1, description="images per step, over all ranks")
    steps: Auto[Annotated[int, Field(ge=1)]] = Field(
        AUTO, description="training steps, which cost no privacy"
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam learning rate, no weight decay")
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights, with the ramp (1+n)/(10+n)"
    )
    label_dropout: float = Field(0.1, ge=0, lt=1, description="probability of hiding an image's label")
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints", json_schema_extra=on())
    log_every: int = Field(
        50,
        ge=1,
        description="steps between lines of the log and points of TensorBoard",
        json_schema_extra=on(),
    )


class Classify(Section):
    """A private classifier that labels the synthetic images, which spends a little privacy.

    Linear, on public features (`privimage.models.label_features`), by gradient descent with the noisy
    gradient of all images in each step. Labels cost far less than images: it knows classes that the generator
    confuses. Off in the paper's method.
    """

    affects = on("classify")

    use: bool = Field(
        False,
        description="whether the synthetic images get the labels of the classifier, in place of those that "
        "the generator was asked for; for methods that are fine-tuned",
        json_schema_extra=on("classify", "synthesize", planned=True),
    )
    features: Literal["query", "fixed"] = Field(
        "query",
        description="what it sees of an image; query: frequencies at each place, and features of the query "
        "network where the method has one; fixed: the frequencies alone",
        json_schema_extra=on("classify", planned=True),
    )
    max_rise: Auto[Annotated[float, Field(gt=0, le=1)]] = Field(
        AUTO,
        description="allowed relative rise of the training's noise for the classifier",
        json_schema_extra=on("classify", planned=True),
    )
    steps: int = Field(
        30,
        ge=2,
        le=1000,
        description="steps; noise is that of all together, however many they are",
        json_schema_extra=on("classify", planned=True),
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="of gradients divided by N; unset: from N and the noise, see docs/method-notes.md",
    )


class Finetune(Section):
    """DP-SGD on the sensitive set, which spends privacy."""

    affects = on("finetune")

    logical_batch_size: Auto[Annotated[int, Field(ge=1)]] = Field(
        AUTO,
        description="B, the expected number of images per step; the sample rate is B / N",
        json_schema_extra=on("finetune", planned=True),
    )
    physical_batch_size: int | Literal["auto"] = Field(
        AUTO, description="images per rank that go through the network at once"
    )
    steps: Auto[Annotated[int, Field(ge=1)]] = Field(
        AUTO,
        description="T, the number of private steps; of a GAN's discriminator",
        json_schema_extra=on("finetune", planned=True),
    )
    noise_copies: Auto[Annotated[int, Field(ge=1)]] = Field(
        AUTO,
        description="diffusion: K, noised copies over which an image's gradient is averaged before clipping",
        json_schema_extra=on("finetune", planned=True),
    )
    # Squares below 1e-38 are lost in float32: over 1e9 parameters a norm of at most 1e-14, which must be
    # little beside C.
    max_grad_norm: Auto[Annotated[float, Field(ge=1e-8)]] = Field(
        AUTO,
        description="C, the bound on the L2 norm of one image's gradient",
        json_schema_extra=on("finetune", planned=True),
    )
    learning_rate: Auto[Annotated[float, Field(gt=0)]] = Field(
        AUTO, description="Adam learning rate of the private steps, no weight decay"
    )
    discriminator_steps: int = Field(
        5, ge=1, le=100, description="GAN: private steps for each step of the generator"
    )
    generator_learning_rate: float = Field(
        2e-4, gt=0, description="GAN: Adam learning rate of the generator, no weight decay"
    )
    generator_batch_size: int = Field(
        256,
        ge=1,
        description="GAN: generated images in a step of the generator over all ranks; costs no privacy",
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights, with the ramp (1+n)/(10+n)"
    )
    label_dropout: float = Field(
        0.1, ge=0, lt=1, description="diffusion: probability of hiding an image's label, all its copies alike"
    )
    start_from: Literal["ema", "raw"] = Field("ema", description="which pretrained weights to start from")
    gradients: Literal["folded", "recorded", "vmap"] = Field(
        "folded",
        description="per-image gradients: folded is fast; recorded is the same as a CUDA graph, for a GPU "
        "that has few images in a step; vmap(grad) is the plain oracle",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description=(
            "of forward and backward; norms, sums and noise are always fp32 or better; auto: bf16 on GPUs "
            "that have it, else fp32"
        ),
    )
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints", json_schema_extra=on())


class Match(Section):
    """DP-MERF and DP-MEPF.

    A generator is trained until the features of its images match the noisy mean embedding of the sensitive
    set.
    """

    affects = on("match", "warm")

    embedding: Literal["random", "network"] = Field(
        "random",
        description="features whose mean is matched. random: random Fourier features (DP-MERF); network: "
        "first and second moments of the features of the query network, which `query` trains on public "
        "images (DP-MEPF)",
        json_schema_extra=on("match", "warm", planned=True),
    )
    features: int = Field(
        2000,
        ge=2,
        multiple_of=2,
        description="random: F, the features of an image, half of them cosines, half sines",
        json_schema_extra=on("match", "warm", planned=True),
    )
    bandwidth: float = Field(
        0.5,
        gt=0,
        description="random: bandwidth of the Gaussian kernel (pixels in [-1, 1]), unit sqrt(pixels); a "
        "constant",
    )
    batch_size: int = Field(500, ge=2, description="generated images per step, over all ranks")
    steps: int = Field(
        4000, ge=1, description="training steps, which use public randomness and the noisy embedding only"
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="Adam learning rate of the generator, no weight decay"
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights, with the ramp (1+n)/(10+n)"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints", json_schema_extra=on())
    log_every: int = Field(
        50,
        ge=1,
        description="steps between lines of the log and points of TensorBoard",
        json_schema_extra=on(),
    )
