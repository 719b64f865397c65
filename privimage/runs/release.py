"""A release as it lies on disk: the synthetic images, their promise, and more images from its model."""

import pickle
import zipfile
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from privimage.config import Config, parse
from privimage.data.sensitive import ImageDraws
from privimage.errors import UserError
from privimage.families import restored, sampled
from privimage.storage.files import read_json
from privimage.telemetry.progress import Progress


class Release:
    """The folder `release/` of a run."""

    def __init__(self, path: Path):
        """`path` is the folder itself, or the directory of its run. Raises UserError if it is no release."""
        self.path = path / "release" if (path / "release").is_dir() else path
        if not (self.path / "PRIVACY.json").is_file():
            raise UserError(f"{path}: no release (PRIVACY.json is missing); `privimage run` makes one")
        self.promise: dict[str, Any] = read_json(self.path / "PRIVACY.json")

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        file = self.path / "synthetic.npz"
        try:
            with np.load(file, allow_pickle=False) as data:
                return data["images"], data["labels"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
            raise UserError(f"{file}: missing or damaged") from None

    @property
    def images(self) -> np.ndarray:
        """The synthetic images, uint8 (N, H, W, C)."""
        return self._arrays[0]

    @property
    def labels(self) -> np.ndarray:
        """Their labels, int64 (N,); all 0 for an unlabelled set."""
        return self._arrays[1]

    @cached_property
    def _model(self) -> dict[str, Any]:
        file = self.path / "model.pt"
        if not file.exists():
            raise UserError(f"{file}: this release has no model to sample from")
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            raise UserError(f"{file}: damaged, or not the model of a release") from None
        # What earlier versions left out, or wrote otherwise.
        classifier = state.get("classifier", {"mirrored": False})
        known = isinstance(classifier, dict) and "mirrored" in classifier
        if "synthesize" not in state or not known:
            raise UserError(f"{file}: made by another version of privimage; sample with that one")
        return state

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label. Raises UserError for a release without a model."""
        return tuple(self._model["classes"])

    @property
    def labelled(self) -> bool:
        """Whether the labels are those of classes. Raises UserError for a release without a model."""
        return self._model["n_classes"] > 0

    @property
    def by_classifier(self) -> bool:
        """Whether a private classifier gives the labels. Raises UserError for a release without a model."""
        return "classifier" in self._model

    @torch.no_grad()
    def sample(self, n: int, seed: int = 0, device: str = "cpu") -> tuple[np.ndarray, np.ndarray]:
        """`n` >= 1 more images uint8 (n, H, W, C) from the released model, and their labels int64 (n,):
        in turn, or those of the classifier that the release has.

        It is post-processing of the release: the promise stays as it is. The images are other ones than those
        of the release for any seed. Raises UserError for a release without a model.
        """
        model, config, place = self._model, self.settings(seed), torch.device(device)
        n_classes = model["n_classes"]
        # The same restoration as in the stage that made the release.
        state = {"ema": model["weights"], "n_classes": n_classes}
        state |= {"classifier": model["classifier"]} if self.by_classifier else {}
        generator, classifier = restored(config, state, place)
        draws = ImageDraws(place)
        # Indices beyond those of the release: with its own seed these would be the same images again.
        first = len(self.labels)
        labels = torch.arange(n, device=place) % max(n_classes, 1)
        images = []
        with Progress("sample", n) as bar:
            for block in torch.arange(n, device=place).split(config.synthesize.batch_size):
                of_block = labels[block] if n_classes else None
                images.append(sampled(config, generator, of_block, first + block, draws))
                bar.advance(len(block))
        drawn = np.concatenate(images)
        if classifier is not None:
            return drawn, classifier.labels(drawn)
        return drawn, labels.cpu().numpy()

    def settings(self, seed: int) -> Config:
        """Settings under which the families sample, with this seed; those of the data are not looked at.

        Raises UserError for a release without a model.
        """
        model = self._model
        anything = {"kind": "npz", "path": "unused"}
        data = {name: model[name] for name in ("resolution", "channels")}
        tree = {name: model[name] for name in ("method", "model", "synthesize")}
        return parse(
            tree
            | {
                "run": {"dir": "unused"},
                "data": data | {"public": anything, "sensitive": anything},
                "runtime": {"seed": seed},
            },
            str(self.path / "model.pt"),
        )
