"""The methods of the paper as settings of one pipeline: pretraining data, generator, private or not."""

from dataclasses import dataclass, field
from typing import Any, Literal

from privimage.errors import UserError


@dataclass(frozen=True)
class Generator:
    """What the settings need to know of a family of generators (`privimage.families`)."""

    noise_copies: bool = False  # its private loss is averaged over noised copies of an image
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)  # of settings, in place of diffusion's


# A GAN's are for CIFAR-10 (Table 6 of the paper: 20,000 and 30 steps of the generator).
GENERATORS: dict[str, Generator] = {
    "diffusion": Generator(noise_copies=True),
    "gan": Generator(
        defaults={
            "pretrain": {"batch_size": 64, "steps": 100_000, "learning_rate": 2e-4},
            "finetune": {"steps": 150, "max_grad_norm": 1.0, "learning_rate": 5e-4},
        }
    ),
    "matching": Generator(),
    "evolution": Generator(),
    "none": Generator(),
}


@dataclass(frozen=True)
class Method:
    """One row of `privimage methods`."""

    title: str
    pretraining: Literal["selected", "random", "all", "none"]
    generator: str  # a key of GENERATORS
    private: bool
    training: Literal["finetune", "match", "evolve"] = (
        "finetune"  # the stage in which the synthetic set is shaped by the sensitive one
    )

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this method runs, in order."""
        # The order of the pipeline; a method leaves out what it does not need.
        names = []
        if self.pretraining != "none":
            names.append("prepare")
        if self.pretraining == "selected" or self.training == "evolve":
            names.append("query")
        if self.pretraining in ("selected", "random"):
            names.append("select")
        if self.pretraining != "none":
            names.append("pretrain")
        if self.generator != "none":
            names += [self.training, "synthesize"]
        return (*names, "evaluate")


METHODS: dict[str, Method] = {
    "privimage+d": Method("PrivImage+D", "selected", "diffusion", True),
    "pdp-diffusion": Method("PDP-Diffusion", "all", "diffusion", True),
    "dpdm": Method("DPDM", "none", "diffusion", True),
    "random+d": Method("Random+D", "random", "diffusion", True),
    "privimage+g": Method("PrivImage+G", "selected", "gan", True),
    "dpgan-p": Method("DPGAN-p", "all", "gan", True),
    "dpgan": Method("DPGAN (DP-CGAN)", "none", "gan", True),
    "dp-merf": Method("DP-MERF", "none", "matching", True, "match"),
    "private-evolution": Method("Private Evolution", "all", "evolution", True, "evolve"),
    "nonprivd": Method("NonPrivD", "selected", "diffusion", False),
    "nonprivg": Method("NonPrivG", "selected", "gan", False),
    "nonpriv": Method("NonPriv", "none", "none", False),
}

# Whose method it is, for the card of a release.
_PRIVIMAGE = (
    "Li et al., PrivImage: Differentially Private Synthetic Image Generation using Diffusion Models with "
    "Semantic-Aware Pretraining, USENIX Security 2024 (arXiv:2311.12850)."
)
_DPGAN = "Xie et al., Differentially Private Generative Adversarial Network, 2018 (arXiv:1802.06739)."
PAPERS: dict[str, str] = {
    "privimage+d": _PRIVIMAGE,
    "privimage+g": _PRIVIMAGE,
    "random+d": _PRIVIMAGE,
    "pdp-diffusion": "Ghalebikesabi et al., Differentially Private Diffusion Models Generate Useful "
    "Synthetic Images, 2023 (arXiv:2302.13861).",
    "dpdm": "Dockhorn et al., Differentially Private Diffusion Models, TMLR 2023 (arXiv:2210.09929).",
    "dpgan-p": _DPGAN,
    "dpgan": _DPGAN,
    "dp-merf": "Harder et al., DP-MERF: Differentially Private Mean Embeddings with Random Features, AISTATS "
    "2021 (arXiv:2002.11603); with features of a network: Harder et al., Pre-trained Perceptual Features "
    "Improve Differentially Private Image Generation, TMLR 2023 (arXiv:2205.12900).",
    "private-evolution": "Lin et al., Differentially Private Synthetic Data via Foundation Model APIs 1: "
    "Images, ICLR 2024 (arXiv:2305.15560).",
}


def with_defaults(tree: dict) -> dict:
    """A tree of settings with the defaults of its method's generator for what it leaves out."""
    return _over(GENERATORS[_generator(tree)].defaults, tree)


def for_method(tree: dict, given: Any) -> dict:
    """What a file with a section `gan` says for its method: see `privimage.config.load`.

    `given` is the tree of the overrides.

    Raises UserError where `gan` holds no sections.
    """
    special = tree.get("gan", {})
    if not isinstance(special, dict):
        raise UserError(f"gan: expected sections of settings for methods with a GAN, not {special!r}")
    # Overrides of the command line win over the section gan, so what they set is left out of it.
    merged = _over(tree, _without(special, given)) if _generator(tree) == "gan" else tree
    return {key: value for key, value in merged.items() if key != "gan"}


def _generator(tree: dict) -> str:
    method = METHODS.get(str(tree.get("method")))
    return method.generator if method else "none"


def _over(low: dict, high: dict) -> dict:
    """Two nested dicts in one; where both have a value it is that of `high`."""
    both = {
        key: _over(low[key], value) if isinstance(value, dict) and isinstance(low.get(key), dict) else value
        for key, value in high.items()
    }
    return low | both


def _without(tree: dict, given: dict) -> dict:
    """A nested dict without the values that `given` has too."""
    nested = {
        key: _without(value, given[key])
        for key, value in tree.items()
        if isinstance(value, dict) and isinstance(given.get(key), dict)
    }
    return {key: value for key, value in tree.items() if key not in given} | nested
