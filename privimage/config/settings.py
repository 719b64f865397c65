"""The typed tree of settings: YAML, then ``section.key=value``.

An unknown key is an error that names the nearest one.

Every field has a description and a range. A `Config` was validated when it was read; no code checks it again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from omegaconf import OmegaConf
from pydantic import Field, model_validator

from privimage.config.data import Data, RunSection
from privimage.config.evolution import Evolve
from privimage.config.methods import GENERATORS, METHODS, Method, for_method, with_defaults
from privimage.config.private import Classify, Finetune, Match, Select, Warm
from privimage.config.promise import Privacy
from privimage.config.public import Model, Pretrain, Query
from privimage.config.results import Evaluate, Synthesize
from privimage.config.section import Section, nearest, on, read_yaml, validated
from privimage.config.slurm import Slurm
from privimage.config.stages import STAGES, upstream

RANDOM = tuple(name for name in STAGES if name != "prepare")  # stages that draw public random numbers


class Runtime(Section):
    """How to run; none of these changes what is promised."""

    affects = on()

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads per rank; unset: cores / local ranks")
    seed: int = Field(
        0,
        ge=0,
        description="seed of public randomness only: query training, pretraining, synthesis",
        json_schema_extra=on(*RANDOM),
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="of public training, synthesis and the CNN of the evaluation; auto: bf16 on GPUs "
        "that have it, else fp32",
        json_schema_extra=on(*RANDOM),
    )
    profile: tuple[int, int] | None = Field(
        None, description="first and last step of public trainings to profile, for TensorBoard"
    )
    timeout_minutes: float = Field(
        30, gt=0, description="how long a rank waits for the others before it gives up"
    )


class Config(Section):
    """All settings of a run."""

    method: str = Field(
        "privimage+d", description="one of `privimage methods`", json_schema_extra=on(*STAGES)
    )
    run: RunSection
    data: Data
    privacy: Privacy = Privacy()
    model: Model = Model()
    query: Query = Query()
    select: Select = Select()
    pretrain: Pretrain = Pretrain()
    warm: Warm = Warm()
    classify: Classify = Classify()
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
        # Combinations that no later code has to handle.
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

    @model_validator(mode="after")
    def _groups_are_known(self) -> "Config":
        if self.privacy.unit == "group" and self.data.sensitive.group is None:
            raise ValueError(
                "data.sensitive.group: needed, since the promise of privacy.unit=group is for groups"
            )
        return self

    @model_validator(mode="after")
    def _labels_can_be_counted(self) -> "Config":
        if self.synthesize.labels == "noisy" and not self.data.sensitive.labelled:
            raise ValueError("synthesize.labels: noisy counts labels, and data.sensitive.labelled is false")
        return self

    @model_validator(mode="after")
    def _labels_can_be_learned(self) -> "Config":
        if self.classify.use and not self.data.sensitive.labelled:
            raise ValueError("classify.use: there are no labels to learn, data.sensitive.labelled is false")
        return self

    @property
    def spec(self) -> Method:
        """What the chosen method pretrains on, which generator it uses, and whether it is private."""
        return METHODS[self.method]

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this run, in order: those of the method, and those that it is given beside."""
        names = {*self.spec.stages, *(("warm",) if self.warm_starts else ())}
        if self.spec.training == "evolve":
            # A simulator takes the place of the pretrained model, a given network that of the query's.
            if self.evolve.simulated:
                names.remove("pretrain")
            if self.evolve.features != "query":
                names.remove("query")
            if names.isdisjoint({"query", "pretrain"}):
                names.remove("prepare")
        embeds = self.spec.training == "match" or "embedding" in self.warm_starts
        if embeds and self.match.embedding == "network":
            names |= {"prepare", "query"}
        # Statistics of each class, as matching and evolution have them, bring their labels along.
        if self.classify.use and "synthesize" in names and self.spec.training == "finetune":
            names.add("classify")
        return tuple(name for name in STAGES if name in names)

    @property
    def public_stages(self) -> tuple[str, ...]:
        """Stages that depend on public images alone, not on the sensitive set or a stage that saw it."""
        return tuple(
            stage
            for stage in self.stages
            if not any(STAGES[before].sensitive for before in upstream(stage, self.stages))
        )

    @property
    def warm_starts(self) -> tuple[str, ...]:
        """The warm starts that apply: `warm.starts` for diffusion models that are fine-tuned, else none."""
        return self.warm.starts if self.spec.generator == "diffusion" else ()

    @property
    def finetuned_from(self) -> str | None:
        """The stage whose weights fine-tuning starts from; None for fresh networks."""
        if self.warm_starts:
            return "warm"
        return "pretrain" if self.spec.pretraining != "none" else None

    @property
    def label_network(self) -> str | None:
        """The query network whose features the private classifier sees; None where it sees none."""
        of_query = self.classify.features == "query" and "query" in self.stages
        return self.query.network if of_query else None

    @property
    def noise_copies(self) -> int:
        """K of the method: 1 where the generator's private loss has no noised copies."""
        return self.finetune.noise_copies if GENERATORS[self.spec.generator].noise_copies else 1

    @property
    def per_unit(self) -> int:
        """m, the images of a unit of privacy that a private step looks at, at most."""
        return self.data.sensitive.per_group if self.privacy.unit == "group" else 1

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
        )  # report a mistake there even if the section is not used
    return config
