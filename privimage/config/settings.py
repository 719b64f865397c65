"""The typed tree of settings: YAML, then ``section.key=value``.

An unknown key is an error that names the nearest one.

Every field has a sentence of help and a range. Inside the house a `Config` is trusted: it was validated at
the door.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from pydantic import Field, model_validator

from privimage.config.methods import METHODS, Method, for_method, with_defaults
from privimage.config.section import Section, nearest, read_yaml, validated
from privimage.config.slurm import Slurm

SensitiveKind = Literal["folder", "npz", "beton", "cifar10", "celeba", "mnist", "fashion-mnist", "digits"]
PublicKind = SensitiveKind | Literal["glyphs"]


class RunSection(Section):
    """Where a run lives."""

    dir: Path = Field(description="the run directory; everything that a run writes is below it")
    shared: Path | None = Field(
        None,
        description=(
            "folder where public stages are kept for other runs that need the same; unset: each run does "
            "its own"
        ),
    )


class PublicData(Section):
    """The public set: anyone may see it. Its labels are what the query function learns.

    A set without them is told apart by clusters.
    """

    kind: PublicKind = Field(description="how to read it")
    path: Path | None = Field(None, description="file or folder; not needed for embedded sets")
    labelled: bool = Field(
        True,
        description=(
            "whether its labels are used; without them a folder needs no class sub-folders, an npz no labels"
        ),
    )
    images_per_class: int = Field(400, ge=1, description="for kind glyphs: images rendered of each character")


class SensitiveData(Section):
    """The set that must stay private."""

    kind: SensitiveKind = Field(description="how to read it")
    path: Path | None = Field(
        None, description="training split: file or folder; not needed for embedded sets"
    )
    test_path: Path | None = Field(
        None, description="held-out split for evaluation; kinds with an own test split need none"
    )
    labelled: bool = Field(
        True, description="whether its labels are used; without them there is one row and one class"
    )
    count: int | None = Field(
        None,
        ge=1,
        description="N, the number of training images, taken as public; `plan` needs it, the data must agree",
    )
    classes: int | None = Field(
        None,
        ge=1,
        description="the number of classes, taken as public; `plan` and an npz without names need it",
    )


class Data(Section):
    """Both image sets, brought to one shape."""

    resolution: int = Field(
        ge=8, le=256, description="pixels of a side; images are centre-cropped and resized to it"
    )
    channels: Literal[1, 3] = Field(3, description="1 grey, 3 RGB")
    public: PublicData
    sensitive: SensitiveData
    store: Literal["auto", "beton", "npy"] = Field(
        "auto",
        description="format of the prepared public set; npy needs no FFCV; auto: beton if FFCV is installed",
    )
    workers: int = Field(
        2, ge=0, le=64, description="processes that prepare and decode public images, a rank"
    )


class Budget(Section):
    """A limit for everything that is ever computed on one sensitive set, over all runs."""

    epsilon: float = Field(gt=0, description="total epsilon that may be spent on the set")
    delta: float = Field(gt=0, lt=1, description="delta at which that total is computed")


class Privacy(Section):
    """The promise."""

    epsilon: float = Field(10.0, gt=0, description="epsilon of the whole run: query and fine-tuning together")
    delta: float | None = Field(
        None, gt=0, lt=1, description="delta of the whole run; unset: 1 / (N ln N), with N taken as public"
    )
    accountant: Literal["pld", "rdp"] = Field(
        "pld", description="pld is tighter (6-8 % less noise); rdp is what the paper used"
    )
    noise_source: Literal["aes-ctr", "chacha20", "insecure-philox"] = Field(
        "aes-ctr",
        description="generator of the Gaussian noise; insecure-philox is fast and not cryptographic",
    )
    insecure_fixed_key: int | None = Field(
        None, ge=0, description="tests only: derive all noise from this number; nothing is private then"
    )
    ledger: Path | None = Field(
        None,
        description=(
            "folder of the ledgers, one a sensitive set; unset: privimage/ledgers in the user's state "
            "directory"
        ),
    )
    budget: Budget | None = Field(
        None, description="refuse a run that would exceed this total for the sensitive set"
    )


class Model(Section):
    """The generator: DDPM++ for diffusion methods, BigGAN for GAN methods."""

    width: int = Field(32, ge=8, le=512, description="base width nf of DDPM++")
    multipliers: tuple[int, ...] = Field(
        (1, 2, 2), min_length=1, max_length=6, description="channel multiplier of each level"
    )
    attention: tuple[int, ...] = Field((16,), description="resolutions with self-attention")
    gan_width: int = Field(96, ge=8, le=256, description="width of BigGAN's generator and discriminator")


class Query(Section):
    """The semantic query function, trained on public images.

    On their labels, or without labels to tell views of one image from others.
    """

    semantics: Literal["labels", "clusters"] = Field(
        "labels", description="what images vote for: public classes, or clusters of the network's features"
    )
    clusters: int = Field(
        100,
        ge=2,
        le=10_000,
        description="number of clusters of the public set, by k-means; for semantics clusters",
    )
    network: Literal["resnet50", "resnet-small"] = Field(
        "resnet50", description="resnet50 is the paper's; resnet-small suits 8x8 to 28x28"
    )
    batch_size: int = Field(8192, ge=1, description="images a step over all ranks")
    steps: int = Field(9400, ge=1, description="training steps")
    learning_rate: float = Field(
        0.01, gt=0, description="SGD learning rate, cosine schedule, momentum 0.9, weight decay 5e-4"
    )
    validation_fraction: float = Field(
        0.05, gt=0, lt=0.5, description="part of the public set held out to choose the checkpoint"
    )
    flip: bool = Field(True, description="random horizontal flips; off for characters")
    checkpoint_every: int = Field(500, ge=1, description="steps between validations and checkpoints")


class Select(Section):
    """The semantic distribution query, which spends privacy."""

    per_image: int = Field(1, ge=1, description="k1: public classes that each sensitive image votes for")
    per_class: int = Field(1, ge=1, description="k2: public classes kept for each sensitive class")
    noise_multiplier: float | None = Field(
        None,
        gt=0,
        description="sigma1; unset: the smallest that raises the noise of fine-tuning by at most max_rise",
    )
    max_rise: float = Field(
        0.005, gt=0, le=1, description="allowed relative rise of the fine-tuning noise when sigma1 is derived"
    )


class Pretrain(Section):
    """Pretraining on the selected public images, without privacy cost."""

    engine: Literal["ddp", "deepspeed"] = Field(
        "ddp", description="data parallelism by torch DDP or DeepSpeed ZeRO"
    )
    deepspeed_config: Path | None = Field(
        None, description="DeepSpeed's JSON; unset: ZeRO stage 1 with bf16 on GPUs"
    )
    batch_size: int = Field(2048, ge=1, description="images a step over all ranks")
    steps: int = Field(128_000, ge=1, description="training steps")
    learning_rate: float = Field(
        1e-4, gt=0, description="Adam learning rate, no weight decay; of both networks of a GAN"
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
    flip: bool = Field(True, description="random horizontal flips; off for characters")
    checkpoint_every: int = Field(1000, ge=1, description="steps between checkpoints")
    log_every: int = Field(50, ge=1, description="steps between lines of the log and points of TensorBoard")


class Finetune(Section):
    """DP-SGD on the sensitive set, which spends privacy."""

    logical_batch_size: int = Field(
        16384, ge=1, description="B, the expected number of images a step; the sample rate is B / N"
    )
    physical_batch_size: int | Literal["auto"] = Field(
        "auto", description="images that go through the network at once, a rank"
    )
    steps: int = Field(152, ge=1, description="T, the number of private steps; of a GAN's discriminator")
    noise_copies: int = Field(
        8,
        ge=1,
        description="diffusion: K, noised copies over which an image's gradient is averaged before clipping",
    )
    # Squares below 1e-38 are lost in float32: over 1e9 parameters a norm of at most 1e-14, which must be
    # little beside C.
    max_grad_norm: float = Field(
        1e-3, ge=1e-8, description="C, the bound on the L2 norm of one image's gradient"
    )
    learning_rate: float = Field(
        3e-4, gt=0, description="Adam learning rate of the private steps, no weight decay"
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
    gradients: Literal["folded", "vmap"] = Field(
        "folded", description="per-image gradients: folded is fast, vmap(grad) is the plain oracle"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="of forward and backward; norms, sums and noise are always fp32 or better"
    )
    checkpoint_every: int = Field(10, ge=1, description="steps between checkpoints")


class Match(Section):
    """DP-MERF.

    A generator is trained until the random features of its images match the noisy mean embedding of the
    sensitive set.
    """

    features: int = Field(
        2000,
        ge=2,
        multiple_of=2,
        description="F, random Fourier features of an image, half of them cosines, half sines",
    )
    bandwidth: float = Field(
        0.5,
        gt=0,
        description="a constant: bandwidth of the Gaussian kernel (pixels in [-1, 1]), unit sqrt(pixels)",
    )
    batch_size: int = Field(500, ge=2, description="generated images a step over all ranks")
    steps: int = Field(
        4000, ge=1, description="training steps, which use public randomness and the noisy embedding only"
    )
    learning_rate: float = Field(
        1e-3, gt=0, description="Adam learning rate of the generator, no weight decay"
    )
    ema_decay: float = Field(
        0.999, ge=0, lt=1, description="decay of the averaged weights, with the ramp (1+n)/(10+n)"
    )
    checkpoint_every: int = Field(500, ge=1, description="steps between checkpoints")
    log_every: int = Field(50, ge=1, description="steps between lines of the log and points of TensorBoard")


class Evolve(Section):
    """Private Evolution.

    Sensitive images vote for synthetic ones of the public model, which are resampled and varied.
    """

    iterations: int = Field(10, ge=1, description="T, noisy histograms of votes")
    population: int = Field(
        200, ge=1, description="synthetic images of each sensitive class that its images vote for"
    )
    threshold: float = Field(
        2.0,
        ge=0,
        description="H, subtracted from noisy counts (down to 0), in standard deviations of their noise",
    )
    first_degree: float = Field(
        2.0,
        gt=0.002,
        lt=80,
        description="noise level sigma of the variations of the first iteration, for pixels in [-1, 1]",
    )
    last_degree: float = Field(
        0.5,
        gt=0.002,
        lt=80,
        description="the same of the last iteration; those between are a geometric series",
    )
    sampler_steps: int = Field(
        18,
        ge=2,
        le=1000,
        description="noise levels from 80 (variations: from their degree) to 0.002, by Euler",
    )
    guidance: float = Field(
        0.0, ge=0, description="classifier-free guidance scale towards an image's public class; 0 is off"
    )
    batch_size: int = Field(500, ge=1, description="images that go through a network at once, a rank")

    @model_validator(mode="after")
    def _degrees_fall(self) -> "Evolve":
        if self.last_degree > self.first_degree:
            raise ValueError(
                f"last_degree {self.last_degree:g} is more than first_degree {self.first_degree:g}; "
                "variations become finer"
            )
        return self


class Synthesize(Section):
    """Sampling of the synthetic set."""

    samples: int = Field(
        50_000,
        ge=1,
        description="images to synthesise, labels in turn so that each class gets the same share",
    )
    sampler: Literal["euler", "heun"] = Field(
        "euler", description="diffusion: deterministic Euler, or EDM's stochastic Heun"
    )
    sampler_steps: int = Field(50, ge=2, le=1000, description="diffusion: noise levels from 80 to 0.002")
    guidance: float = Field(0.0, ge=0, description="diffusion: classifier-free guidance scale; 0 is off")
    batch_size: int = Field(500, ge=1, description="images that go through the network at once, a rank")
    images: bool = Field(False, description="also write the images as PNG files under release/images")


class Evaluate(Section):
    """Measures of the synthetic set; those that use sensitive data are not covered by the promise."""

    classifiers: tuple[Literal["lr", "mlp", "cnn"], ...] = Field(
        ("lr", "mlp", "cnn"), description="trained on synthetic images, tested on real ones"
    )
    cnn_epochs: int = Field(50, ge=1, description="epochs of the CNN")
    cnn_batch_size: int = Field(512, ge=2, description="batch size of the CNN")
    before: bool = Field(
        True, description="also measure the pretrained generator, before private fine-tuning"
    )
    features: Literal["auto", "2048", "768", "stand-in"] = Field(
        "auto", description="features of FID and KID; auto: what the weights allow"
    )
    inception_weights: Path | None = Field(
        None, description="Inception 2015-12-05 weights in torch-fidelity's format"
    )
    fidelity_samples: int = Field(
        5000, ge=10, description="synthetic images that enter FID, KID, precision and recall"
    )
    reference_samples: int | None = Field(
        None,
        ge=10,
        description="sensitive training images to compare with; unset: as many as fidelity_samples",
    )
    word_vectors: Path | None = Field(
        None, description="npz of words and vectors for the semantic distribution similarity"
    )


class Runtime(Section):
    """How to run; none of these changes what is promised."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads a rank; unset: cores / local ranks")
    seed: int = Field(
        0, ge=0, description="seed of public randomness only: query training, pretraining, synthesis"
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "fp32", description="of public training and of synthesis; auto: bf16 where the device is faster in it"
    )
    timeout_minutes: float = Field(
        30, gt=0, description="how long a rank waits for the others before it gives up"
    )


class Config(Section):
    """All settings of a run."""

    method: str = Field("privimage+d", description="one of `privimage methods`")
    run: RunSection
    data: Data
    privacy: Privacy = Privacy()
    model: Model = Model()
    query: Query = Query()
    select: Select = Select()
    pretrain: Pretrain = Pretrain()
    finetune: Finetune = Finetune()
    match: Match = Match()
    evolve: Evolve = Evolve()
    synthesize: Synthesize = Synthesize()
    evaluate: Evaluate = Evaluate()
    runtime: Runtime = Runtime()
    slurm: Slurm = Slurm()

    @model_validator(mode="after")
    def _method_is_known(self) -> "Config":
        if self.method not in METHODS:
            raise ValueError(
                f"method: unknown {self.method!r}{nearest(self.method, METHODS)}; known: {', '.join(METHODS)}"
            )
        return self

    @model_validator(mode="after")
    def _semantics_are_known(self) -> "Config":
        needed = self.spec.pretraining in ("selected", "random")
        if needed and self.query.semantics == "labels" and not self.data.public.labelled:
            raise ValueError(
                f"query.semantics: {self.method} chooses by labels, and data.public.labelled is false; use "
                "query.semantics=clusters"
            )
        if self.spec.pretraining == "random" and self.query.semantics == "clusters":
            raise ValueError(
                f"query.semantics: {self.method} has no query, and clusters are made by one; use "
                "query.semantics=labels"
            )
        return self

    @property
    def spec(self) -> Method:
        """What the chosen method pretrains on, which generator it uses, and whether it is private."""
        return METHODS[self.method]

    @property
    def noise_copies(self) -> int:
        """K of the method: diffusion alone adds noise to images."""
        return self.finetune.noise_copies if self.spec.generator == "diffusion" else 1

    def to_yaml(self) -> str:
        """The resolved settings as YAML; `load` reads it back to an equal tree."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))


def parse(tree: dict, origin: str = "configuration") -> Config:
    """Validate a nested dict of settings. Raises UserError with one line that names the key."""
    return validated(Config, with_defaults(tree), origin)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides.

    A section `gan` of the file holds sections whose settings replace those of the same name where the
    method's generator is a GAN; so one file serves all methods. Overrides come last.

    Raises UserError, in one line that names the file or the key, for a missing or malformed file, an unknown
    key, or a value out of range.
    """
    tree = read_yaml(Path(path), overrides)
    config = parse(
        for_method(tree, OmegaConf.to_container(OmegaConf.from_dotlist(list(overrides)))), str(path)
    )
    if "gan" in tree and config.spec.generator != "gan":
        parse(
            for_method(tree | {"method": "dpgan"}, {}), f"{path}: gan"
        )  # a mistake there is told before the section is used
    return config
