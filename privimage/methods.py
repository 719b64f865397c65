"""The methods of the paper as settings of one pipeline (METHOD table: what is pretrained on, which generator, private or not)."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One row of `privimage methods`."""

    title: str
    pretraining: Literal["selected", "all", "none"]
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
            names += ["query", "select"]
        if self.pretraining != "none":
            names.append("pretrain")
        if self.generator != "none":
            names += [self.training, "synthesize"]
        return (*names, "evaluate")


METHODS: dict[str, Method] = {
    "privimage+d": Method("PrivImage+D", "selected", "diffusion", True),
    "pdp-diffusion": Method("PDP-Diffusion", "all", "diffusion", True),
    "dpdm": Method("DPDM", "none", "diffusion", True),
    "nonprivd": Method("NonPrivD", "selected", "diffusion", False),
    "nonpriv": Method("NonPriv", "none", "none", False),
}
