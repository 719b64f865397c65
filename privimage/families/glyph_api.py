"""Characters in the fonts of matplotlib as the images of Private Evolution: a simulator, not a model."""

import numpy as np
import torch
from torch import Tensor

from privimage.data.glyphs import CHARACTERS, LOW, WAVES, Glyph, draw, holders
from privimage.families.image_api import ImageAPI


class GlyphAPI(ImageAPI):
    """Renders characters (Sim-PE, Lin et al. 2025, arXiv 2502.05505).

    The traits of an image are its parameters as standard normal numbers: character, face, what is varied
    evenly (size, rotation, shear, aspect, offsets, thickness of strokes), and the waves that distort it. All
    three channels of a coloured image are alike.
    """

    EVENLY, BENT = len(LOW), 2 * WAVES * WAVES
    traits = 2 + EVENLY + BENT
    draws = traits + 1

    def random(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        """See `ImageAPI.random`; each character and each face that has it with equal chances."""
        traits = normal[:, 1:].double()
        return self._drawn(traits), traits

    def vary(self, images: Tensor, traits: Tensor, normal: Tensor, degree: float) -> tuple[Tensor, Tensor]:
        """See `ImageAPI.vary`; the character stays, as the public class of a diffusion model does.

        Numbers move by z <- a z + sqrt(1 - a^2) n with a = 1 / sqrt(1 + degree^2), which leaves them standard
        normal, as images are noised up to a level `degree` of their unit variance. The face is another one
        with probability 1 - a.
        """
        kept = (1 + degree**2) ** -0.5
        fresh = normal[:, 1:].double()
        varied = kept * traits + (1 - kept**2) ** 0.5 * fresh
        varied[:, 0] = traits[:, 0]
        other = torch.special.ndtr(normal[:, 0].double()) < 1 - kept
        varied[:, 1] = torch.where(other, fresh[:, 1], traits[:, 1])
        return self._drawn(varied), varied

    def _drawn(self, traits: Tensor) -> Tensor:
        """traits float64 (B, T) -> images uint8 (B, C, H, W)."""
        channels, resolution, _ = self.shape
        rows = [draw(self._glyph(row), resolution) for row in traits.cpu().numpy()]
        images = torch.from_numpy(np.stack(rows)).to(traits.device)
        return images[:, None].expand(-1, channels, -1, -1).contiguous()

    def _glyph(self, traits: np.ndarray) -> Glyph:
        uniform = torch.special.ndtr(torch.from_numpy(traits)).numpy()
        character = CHARACTERS[_choice(uniform[0], len(CHARACTERS))]
        known = holders(character)
        waves = traits[2 + self.EVENLY :].reshape(2, WAVES, WAVES)
        return Glyph(character, known[_choice(uniform[1], len(known))], uniform[2 : 2 + self.EVENLY], waves)


def _choice(uniform: float, count: int) -> int:
    """One of `count` by a number in [0, 1]."""
    return min(int(uniform * count), count - 1)
