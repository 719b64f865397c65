"""The methods of the paper as settings of one pipeline (METHOD table: what is pretrained on, which generator, private or not)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One row of `privimage methods`."""

    title: str
    pretraining: Literal["selected", "random", "all", "none"]
    generator: Literal["diffusion", "gan", "none"]
    private: bool
    training: Literal["finetune"] = "finetune"  # the stage that the generator learns the sensitive set in

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this method runs, in order."""
        names = []
        if self.pretraining != "none":
            names.append("prepare")
        if self.pretraining == "selected":
            names.append("query")
        if self.pretraining in ("selected", "random"):
            names.append("select")
        if self.pretraining != "none":
            names.append("pretrain")
        if self.generator != "none":
            names += [self.training, "synthesize"]
        return (*names, "evaluate")

    @property
    def public_stages(self) -> tuple[str, ...]:
        """Those that depend on public images alone, neither on the sensitive set nor on a stage that saw it."""
        public = ("prepare", "query", "pretrain") if self.pretraining == "all" else ("prepare", "query")
        return tuple(stage for stage in self.stages if stage in public)


METHODS: dict[str, Method] = {
    "privimage+d": Method("PrivImage+D", "selected", "diffusion", True),
    "pdp-diffusion": Method("PDP-Diffusion", "all", "diffusion", True),
    "dpdm": Method("DPDM", "none", "diffusion", True),
    "random+d": Method("Random+D", "random", "diffusion", True),
    "nonprivd": Method("NonPrivD", "selected", "diffusion", False),
    "nonpriv": Method("NonPriv", "none", "none", False),
}
