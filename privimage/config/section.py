"""What all sections of settings have in common: how they are read, and how mistakes are reported."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError
from yaml import YAMLError

from privimage.config.stages import STAGES
from privimage.errors import UserError


class Section(BaseModel):
    """One section of the settings; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    affects: ClassVar[dict[str, Any] | None] = None  # of its fields that do not say it themselves, by `on`


def on(*stages: str, planned: bool = False, place: bool = False) -> dict[str, Any]:
    """Declare what a setting affects, as ``json_schema_extra`` of its field or ``affects`` of its section.

    Args:
        stages: the stages that read it, whose results it may change; none: it changes no result.
        planned: whether it is part of the privacy plan, which is fixed when the account is opened.
        place: whether it only says where images or weights are; the identity of a computation has their
            content instead.
    """
    # A misspelt stage in a declaration would make a setting look harmless.
    if unknown := set(stages) - set(STAGES):
        raise ValueError(f"no such stage: {', '.join(sorted(unknown))}")
    return {"stages": list(stages), "planned": planned, "place": place}


# How pydantic names the choice of a union beside the key.
OF_A_UNION = re.compile(r"\[|^constrained-|^(int|float|str)$")
S = TypeVar("S", bound=Section)
T = TypeVar("T")
# A setting that may be "auto", for a value that depends on the size of the set or on the machine. Its type is
# that of the value: `privimage.recipes` puts one in place of every "auto" before anything else is done.
if TYPE_CHECKING:
    Auto = Annotated[T, "auto"]
else:
    Auto = T | Literal["auto"]
AUTO: Any = "auto"


def validated(model: type[S], tree: dict, origin: str) -> S:
    """Validate a nested dict of settings. Raises UserError with one line: `origin` and the key."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{origin}: {_one_line(model, error)}") from None


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict:
    """The sections of a YAML file as plain values, after ``section.key=value`` overrides.

    Raises UserError that names the file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such configuration file")
    # Overrides are looked at first: a typing mistake there is more likely than a broken file.
    for item in overrides:
        if "=" not in item:
            raise UserError(f"{item}: overrides are written section.key=value")
    try:
        tree = OmegaConf.load(path)
        if not OmegaConf.is_dict(tree):
            raise ValueError("expected sections with settings at the top level")
        plain = OmegaConf.to_container(
            OmegaConf.merge(tree, OmegaConf.from_dotlist(list(overrides))), resolve=True
        )
    except (YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    assert isinstance(plain, dict)
    return plain


def nearest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean ...?)`` with the known word that is most like this one; empty if none is."""
    # A hint only where the words are rather alike; a wrong one would mislead.
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _one_line(model: type[Section], error: ValidationError) -> str:
    # One mistake at a time: pydantic's own list names its classes, which mean nothing to a user.
    first = error.errors()[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location if not OF_A_UNION.search(str(part)))
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown setting{nearest(str(location[-1]), _known_keys(model, location[:-1]))}"
    if first["type"] == "missing":
        return f"{key}: required setting is missing"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message
    value = first.get("input")
    return f"{key}: {message[0].lower()}{message[1:]}" + (
        f", not {value!r}" if not isinstance(value, dict | BaseModel) else ""
    )


def _known_keys(model: type[Section], location: tuple) -> list[str]:
    for part in location:
        if part not in model.model_fields:
            continue  # a key of a mapping or a place in a list, whose values are sections of the same kind
        nested = next(_sections_in(model.model_fields[part].annotation), None)
        if nested is None:
            return []
        model = nested
    return list(model.model_fields)


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
