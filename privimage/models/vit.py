"""Vision transformers whose features fidelity measures compare: DINOv2, and the image tower of CLIP.

Dosovitskiy et al. 2021, under the names of DINOv2's checkpoints (Oquab et al. 2023); those of CLIP (Radford
et al. 2021) are translated. Sizes are read from the weights.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 64  # width of an attention head, in every published size of both
SIDE = 224  # pixels, to which images are resized
# Mean and deviation of pixels in [0, 1], by red, green and blue, with which each was trained.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# From names of OpenAI's CLIP to those of DINOv2.
CLIP_NAMES = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


@dataclass(frozen=True)
class Size:
    """The shape of a vision transformer; `outputs` 0 is without a projection at the end."""

    width: int
    depth: int
    patch: int
    grid: int  # patches along a side for which there are position embeddings
    outputs: int
    clip: bool

    @classmethod
    def of(cls, state: dict[str, Tensor], clip: bool) -> "Size":
        """The size of weights under DINOv2's names. Raises KeyError or ValueError for others."""
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
        outputs = state["head.weight"].shape[0] if "head.weight" in state else 0
        return cls(width, depth, patch, grid, outputs, clip)


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, width)."""
        batch, count, width = tokens.shape
        query, key, value = self.qkv(tokens).view(batch, count, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, width))


class _MLP(nn.Module):
    def __init__(self, width: int, clip: bool) -> None:
        super().__init__()
        self.fc1, self.fc2, self.clip = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), clip

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.fc1(tokens)
        # OpenAI's CLIP was trained with an approximation of GELU.
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden) if self.clip else F.gelu(hidden))


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width, eps = size.width, 1e-5 if size.clip else 1e-6
        self.norm1, self.attn = nn.LayerNorm(width, eps), _Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width, eps), _MLP(width, size.clip)
        self.ls1, self.ls2 = (nn.Identity() if size.clip else _Scale(width) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class VisionTransformer(nn.Module):
    """Images to the features of the class token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size, eps = size, 1e-5 if size.clip else 1e-6
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, size.width, size.patch, size.patch, bias=not size.clip)}
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + size.grid**2, size.width))
        self.norm_pre = nn.LayerNorm(size.width, eps) if size.clip else nn.Identity()
        self.blocks = nn.ModuleList(_Block(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps)
        self.head = nn.Linear(size.width, size.outputs, bias=False) if size.outputs else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """images uint8 (B, 3, H, W) -> features float32 (B, D)."""
        mean, deviation = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (CLIP if self.size.clip else IMAGENET)
        )
        resized = F.interpolate(images.float(), (SIDE, SIDE), mode="bicubic", antialias=True)
        return self.features((resized.round().clamp(0, 255) / 255 - mean) / deviation)

    def features(self, inputs: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), whole numbers of patches, -> features (B, D)."""
        patches = self.patch_embed["proj"](inputs)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        tokens = self.norm_pre(tokens + self._positions(patches.shape[-1]))
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(self.norm(tokens[:, 0]))

    def _positions(self, grid: int) -> Tensor:
        """Position embeddings for grid x grid patches, as DINOv2 interpolates them (offset 0.1)."""
        if grid == self.size.grid:
            return self.pos_embed
        first, others = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        square = others.view(1, self.size.grid, self.size.grid, -1).permute(0, 3, 1, 2)
        scale = (grid + 0.1) / self.size.grid
        square = F.interpolate(square, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([first, square.flatten(2).transpose(1, 2)], 1)


def from_weights(state: dict[str, Tensor]) -> tuple[str, VisionTransformer]:
    """("dinov2" or "clip", the network) for the state dict of one of them.

    Raises ValueError for the weights of anything else.
    """
    clip = "visual.conv1.weight" in state
    try:
        named = _translated(state) if clip else {k: v for k, v in state.items() if k != "mask_token"}
        network = VisionTransformer(Size.of(named, clip))
        network.load_state_dict({name: value.float() for name, value in named.items()})
    except (KeyError, ValueError, RuntimeError):
        raise ValueError("neither DINOv2's nor CLIP's vision transformer") from None
    return "clip" if clip else "dinov2", network.eval()


def _translated(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image tower of CLIP under DINOv2's names."""
    named = {}
    for name, value in state.items():
        if not name.startswith("visual."):
            continue  # the text tower
        name = name.removeprefix("visual.")
        for pattern, replacement in CLIP_NAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    named["cls_token"], named["pos_embed"] = named["cls_token"].view(1, 1, -1), named["pos_embed"][None]
    named["head.weight"] = named.pop("proj").T
    return named
