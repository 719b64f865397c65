"""`privimage sample`: more images from a released model, in a folder like that of the release."""

import sys
from pathlib import Path

import torch

from privimage.config.results import Synthesize
from privimage.config.section import validated
from privimage.errors import UserError
from privimage.releases.assemble import assemble, whole
from privimage.releases.formats import FORMATS
from privimage.releases.synthetic import SyntheticSet
from privimage.runs.release import Release


def run(path: Path, count: int, seed: int, formats: str, out: Path | None) -> None:
    """Draw `count` images and write them, with the statement of the release and a card of their own.

    The promise of the release covers them: nothing is charged. They are other images than those of the
    release, for any seed. `formats` are names of `synthesize.formats`, separated by commas. Raises UserError
    for a release without a model, an unknown or missing format, and a folder that exists.
    """
    release = Release(path)
    config, folder = release.settings(seed), out or release.path.parent / f"sample-{seed}"
    if folder.exists():
        raise UserError(f"{folder}: exists already; name another folder with --out")
    if not folder.parent.is_dir():
        raise UserError(f"{folder.parent}: no such folder")
    wanted = [name for name in formats.split(",") if name]
    tree = config.synthesize.model_dump(mode="json") | {"formats": wanted}
    config = config.model_copy(update={"synthesize": validated(Synthesize, tree, "--formats")})
    for name in config.synthesize.formats:
        if missing := FORMATS[name].missing():
            raise UserError(f"--formats: {name} needs what is not installed: {missing}")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = release.sample(count, seed, device)
    synthetic = SyntheticSet(*drawn, release.classes, release.by_classifier)
    with whole(folder) as aside:
        assemble(aside, config, synthetic, release.promise, labelled=release.labelled, drawn_later=seed)
    sys.stdout.write(f"{folder}: {count:,} images, seed {seed}. {_promise(release.promise)}\n")


def _promise(said: dict) -> str:
    if not said["private"]:
        return f"This release is {said['reason']}; neither these images nor those protect anyone."
    return (
        "Post-processing of the release: nothing was charged, and its promise "
        f"(epsilon {said['epsilon']:g}, delta {said['delta']:g}) covers them."
    )
