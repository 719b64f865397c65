"""The section `privacy` of the settings: the promise, and where what was spent is recorded."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from privimage.config.section import Section, on
from privimage.config.stages import DRAWING


class Budget(Section):
    """A limit for everything that is ever computed on one sensitive set, over all runs."""

    affects = on()

    epsilon: float = Field(gt=0, description="total epsilon that may be spent on the set")
    delta: float = Field(gt=0, lt=1, description="delta at which that total is computed")


class Privacy(Section):
    """The promise."""

    affects = on(planned=True)

    epsilon: float = Field(10.0, gt=0, description="epsilon of the whole run: query and fine-tuning together")
    delta: float | None = Field(
        None, gt=0, lt=1, description="delta of the whole run; unset: 1 / (N ln N), with N taken as public"
    )
    unit: Literal["image", "group"] = Field(
        "image",
        description="whom the promise is for: each image, or each group of images (data.sensitive.group)",
    )
    neighbours: Literal["add-or-remove", "replace"] = Field(
        "add-or-remove",
        description="sets that the promise compares: with one more or less, or one replaced (more noise)",
    )
    accountant: Literal["pld", "rdp"] = Field(
        "pld",
        description="pld is tighter (6-8 % less noise); rdp is what the paper used, and knows no replacement",
    )
    noise_source: Literal["aes-ctr", "chacha20", "insecure-philox"] = Field(
        "aes-ctr",
        description="generator of the Gaussian noise; insecure-philox is fast and not cryptographic",
        json_schema_extra=on(*DRAWING),
    )
    insecure_fixed_key: int | None = Field(
        None,
        ge=0,
        description="tests only: derive all noise from this number; nothing is private then",
        json_schema_extra=on(*DRAWING),
    )
    ledger: Path | None = Field(
        None,
        description=(
            "folder of the ledgers, one per sensitive set; unset: privimage/ledgers in the user's state "
            "directory"
        ),
        json_schema_extra=on(),
    )
    budget: Budget | None = Field(
        None,
        description="refuse a run that would exceed this total for the sensitive set",
        json_schema_extra=on(),
    )

    @model_validator(mode="after")
    def _accountant_knows_the_relation(self) -> "Privacy":
        # dp-accounting's RDP accountant has no bound for Poisson samples under replacement.
        if self.neighbours == "replace" and self.accountant == "rdp":
            raise ValueError("accountant: rdp has no bound for neighbours=replace; use pld")
        return self
