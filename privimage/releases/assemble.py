"""Puts a release together, file by file, from an allow-list."""

import contextlib
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from privimage.config import Config
from privimage.errors import UserError
from privimage.evaluation import figures
from privimage.families import family
from privimage.privacy.statement import statement_for_people
from privimage.releases.card import About, card
from privimage.releases.formats import FORMATS
from privimage.releases.model import write_model
from privimage.releases.synthetic import SyntheticSet
from privimage.storage import owner_only
from privimage.storage.files import write_arrays, write_json, write_whole

# Regular expressions of all that may be in a release, folders too.
ALLOWED = (
    r"PRIVACY\.(json|md)",
    r"README\.md",
    r"samples\.png",
    r"synthetic\.npz",
    r"model\.(pt|safetensors)",
    r"config\.json",
    *(pattern for known in FORMATS.values() for pattern in known.files),
)


def assemble(
    folder: Path,
    config: Config,
    synthetic: SyntheticSet,
    said: dict[str, Any],
    *,
    labelled: bool,
    weights: dict[str, Any] | None = None,
    drawn_later: int | None = None,
) -> None:
    """Write everything of a release into an empty folder, the statement first.

    Args:
        folder: it exists already.
        config: `synthesize.formats` are written; its method, model and sampler describe the model.
        synthetic: the images.
        said: the statement, PRIVACY.json.
        labelled: whether the labels are those of classes.
        weights: what the training has left; None writes no model.
        drawn_later: the seed, for images drawn from a released model afterwards.

    Raises UserError when the disk is full.
    """
    has_model = weights is not None and family(config).releases_model
    try:
        write_json(folder / "PRIVACY.json", said)
        write_whole(folder / "PRIVACY.md", statement_for_people(said).encode())
        arrays = {"images": synthetic.images, "labels": synthetic.labels}
        write_arrays(folder / "synthetic.npz", arrays)
        for name in config.synthesize.formats:
            FORMATS[name].write(folder, synthetic)
        if weights is not None and has_model:
            write_model(folder, config, weights)
        rows = _contact_sheet(folder / "samples.png", synthetic)
    except OSError as error:
        raise UserError(
            f"{folder}: could not be written ({error.strerror or error}); make room and run again"
        ) from None
    simulator = config.evolve.api if config.spec.training == "evolve" and config.evolve.simulated else None
    about = About(labelled, has_model, rows, config.synthesize.formats, simulator, drawn_later)
    write_whole(folder / "README.md", card(synthetic, said, about).encode())
    require_allowed(folder)


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place when everything is in it, open to all readers."""
    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    yield aside
    # The only files of a run that others may read.
    owner_only.open_to_all(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _contact_sheet(path: Path, synthetic: SyntheticSet) -> list[int]:
    images = synthetic.images.transpose(0, 3, 1, 2)
    return figures.sample_grid(path, images, synthetic.labels, len(synthetic.classes))


def require_allowed(folder: Path, allowed: Sequence[str] = ALLOWED) -> None:
    """Raise RuntimeError for anything below `folder` that is not on the allow-list of a release."""
    below = sorted(entry.relative_to(folder).as_posix() for entry in folder.rglob("*"))
    if unknown := [name for name in below if not any(re.fullmatch(pattern, name) for pattern in allowed)]:
        raise RuntimeError(f"{folder}: {unknown} are not on the allow-list of a release")
