"""DINOv2 and CLIP from files of the published names and shapes, with random numbers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from privimage import torchvision_operators
from privimage.errors import UserError
from privimage.evaluation import extractor, fidelity
from privimage.models import vit

RANDOM = torch.Generator().manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return 0.05 * torch.randn(shape, generator=RANDOM)


def pair(name: str, *shape: int, outputs: int | None = None) -> dict[str, Tensor]:
    """A weight and its bias; of a norm where it has one dimension."""
    return {f"{name}.weight": numbers(*shape), f"{name}.bias": numbers(outputs or shape[0])}


def dinov2(depth: int = 12, width: int = 384, grid: int = 37) -> dict[str, Tensor]:
    """The state dict of dinov2_vits14_pretrain.pth."""
    state = {"cls_token": numbers(1, 1, width), "pos_embed": numbers(1, 1 + grid**2, width)}
    state |= {"mask_token": numbers(1, width)} | pair("patch_embed.proj", width, 3, 14, 14)
    for i in range(depth):
        name = f"blocks.{i}"
        state |= pair(f"{name}.norm1", width) | pair(f"{name}.norm2", width)
        state |= pair(f"{name}.attn.qkv", 3 * width, width) | pair(f"{name}.attn.proj", width, width)
        state |= pair(f"{name}.mlp.fc1", 4 * width, width) | pair(f"{name}.mlp.fc2", width, 4 * width)
        state |= {f"{name}.ls{k}.gamma": numbers(width) for k in (1, 2)}
    return state | pair("norm", width)


def clip(depth: int = 12, width: int = 768, outputs: int = 512) -> dict[str, Tensor]:
    """The state dict of OpenAI's ViT-B/32, with a part of its text tower."""
    state = {"class_embedding": numbers(width), "positional_embedding": numbers(50, width)}
    state |= {"conv1.weight": numbers(width, 3, 32, 32), "proj": numbers(width, outputs)}
    state |= pair("ln_pre", width) | pair("ln_post", width)
    for i in range(depth):
        name = f"transformer.resblocks.{i}"
        state |= pair(f"{name}.ln_1", width) | pair(f"{name}.ln_2", width)
        state |= {f"{name}.attn.in_proj_weight": numbers(3 * width, width)}
        state |= {f"{name}.attn.in_proj_bias": numbers(3 * width)}
        state |= pair(f"{name}.attn.out_proj", width, width)
        state |= pair(f"{name}.mlp.c_fc", 4 * width, width) | pair(f"{name}.mlp.c_proj", width, 4 * width)
    return {f"visual.{name}": value for name, value in state.items()} | {"logit_scale": numbers(1)}


@torch.no_grad()
def test_blocks_are_those_of_torchvision() -> None:
    """A transformer without layer scale is DINOv2's with a scale of 1."""
    torchvision_operators.declare()
    from torchvision.models import VisionTransformer

    theirs = VisionTransformer(224, 14, num_layers=2, num_heads=6, hidden_dim=384, mlp_dim=1536).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    named = {
        "class_token": "cls_token",
        "conv_proj.": "patch_embed.proj.",
        "encoder.pos_embedding": "pos_embed",
        "encoder.layers.encoder_layer_": "blocks.",
        "encoder.ln.": "norm.",
        "ln_": "norm",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj.": "attn.proj.",
        "mlp.0.": "mlp.fc1.",
        "mlp.3.": "mlp.fc2.",
    }
    state = {f"blocks.{i}.ls{k}.gamma": torch.ones(384) for i in range(2) for k in (1, 2)}
    for name, value in theirs.state_dict().items():
        if not name.startswith("heads."):
            for old, new in named.items():
                name = name.replace(old, new)
            state[name] = value
    theirs.heads = nn.Identity()
    inputs = torch.randn(2, 3, 224, 224, generator=RANDOM)
    assert torch.allclose(vit.from_weights(state)[1].features(inputs), theirs(inputs), atol=1e-5)


@torch.no_grad()
def test_the_tower_of_clip_is_its_formula() -> None:
    state, width = clip(depth=1), 768
    part = {name.removeprefix("visual."): value for name, value in state.items()}
    attention = nn.MultiheadAttention(width, 12, batch_first=True).eval()
    block = "transformer.resblocks.0."
    attention.load_state_dict(
        {n.removeprefix(f"{block}attn."): v for n, v in part.items() if n.startswith(f"{block}attn.")}
    )

    def norm(name: str, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, (width,), part[f"{name}.weight"], part[f"{name}.bias"])

    def linear(name: str, tokens: Tensor) -> Tensor:
        return F.linear(tokens, part[f"{name}.weight"], part[f"{name}.bias"])

    inputs = torch.randn(2, 3, 224, 224, generator=RANDOM)
    patches = F.conv2d(inputs, part["conv1.weight"], stride=32).flatten(2).transpose(1, 2)
    tokens = torch.cat([part["class_embedding"].expand(2, 1, -1), patches], 1) + part["positional_embedding"]
    tokens = norm("ln_pre", tokens)
    normed = norm(f"{block}ln_1", tokens)
    tokens = tokens + attention(normed, normed, normed)[0]
    hidden = linear(f"{block}mlp.c_fc", norm(f"{block}ln_2", tokens))
    tokens = tokens + linear(f"{block}mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
    expected = norm("ln_post", tokens[:, 0]) @ part["proj"]
    assert torch.allclose(vit.from_weights(state)[1].features(inputs), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "suffix", "width"),
    [("dinov2", ".pth", 384), ("dinov2", ".safetensors", 384), ("clip", ".pt", 512)],
)
def test_files_of_the_published_shapes_are_features_of_fidelity(
    name: str, suffix: str, width: int, tmp_path: Path
) -> None:
    state, file = {"dinov2": dinov2, "clip": clip}[name](), tmp_path / f"weights{suffix}"
    if name == "clip":
        state = {key: value.half() for key, value in state.items()}  # as it is published
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    found = extractor.vision(file)
    assert found is not None and found.features == name and name.upper() in found.name.upper()
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    with torch.no_grad():
        features = found.network(torch.from_numpy(images))
    assert features.shape == (3, width) and features.dtype == torch.float32
    assert features.std(0).min() > 0 and found.identity.startswith(name)
    told = fidelity.described(found, features.repeat(9, 1), features.repeat(9, 1))
    assert told["name"] == found.name and told["fid"] is None and told["distance"] < 1e-3


def test_grey_and_constant_images_reach_the_network_as_they_are() -> None:
    network = vit.VisionTransformer(vit.Size(64, 1, 14, 16, 0, clip=False))
    seen = []
    network.features = lambda inputs: seen.append(inputs) or inputs  # type: ignore[method-assign,assignment]
    network(torch.full((1, 3, 8, 8), 255, dtype=torch.uint8))
    white = [(1 - mean) / deviation for mean, deviation in zip(*vit.IMAGENET, strict=True)]
    assert seen[0].shape == (1, 3, 224, 224)
    assert torch.allclose(seen[0].mean((0, 2, 3)), torch.tensor(white), atol=1e-5)


def test_other_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    assert extractor.vision(None) is None
    file, state = tmp_path / "weights.pth", dinov2(depth=1)
    for wrong in ({"a": numbers(2)}, state | {"register_tokens": numbers(1, 4, 384)}, {"x": 1}):
        torch.save(wrong, file)
        with pytest.raises(UserError, match=r"evaluate\.vision_weights: .*weights\.pth: n"):
            extractor.vision(file)
    with pytest.raises(UserError, match="No such file"):
        extractor.vision(tmp_path / "none.pth")
