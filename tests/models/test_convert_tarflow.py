"""Apple's TarFlow layout gives a plain implementation's numbers, and everything but the noise is inferred."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints import load_flow, save_checkpoint
from models.convert import convert
from models.errors import (
    CheckpointError,
    ManifestError,
    MissingFactError,
    NonFiniteError,
    TensorMismatchError,
    UnknownFamilyError,
)
from models.probe import probe
from models.tarflow import TarFlow
from tests.models.flow_table import generator

State = dict[str, Tensor]


def published_layout(
    *, channels: int = 3, patch: int = 2, rows: int = 2, width: int = 64, blocks: int = 2, layers: int = 1,
    classes: int = 0, volume_preserving: bool = False,
) -> State:  # fmt: skip
    """Random weights under every name that a published file holds."""
    draws = generator(3)
    tokens, size = rows**2, channels * patch**2

    def draw(*shape: int, scale: float = 0.1) -> Tensor:
        return torch.randn(shape, generator=draws) * scale

    def linear(name: str, inputs: int, outputs: int) -> State:
        return {f"{name}.weight": draw(outputs, inputs), f"{name}.bias": draw(outputs)}

    def norm(name: str) -> State:
        return {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}

    state = {"var": torch.ones(tokens, size) * (1.5 if volume_preserving else 1.0)}
    for k in range(blocks):
        block = f"blocks.{k}."
        state[block + "pos_embed"] = draw(tokens, width)
        state[block + "attn_mask"] = torch.ones(tokens, tokens).tril()
        if classes:
            state[block + "class_embed"] = draw(classes, 1, width, scale=0.5)
        state |= linear(block + "proj_in", size, width)
        state |= linear(block + "proj_out", width, size * (1 if volume_preserving else 2))
        for index in range(layers):
            layer = f"{block}attn_blocks.{index}."
            state |= norm(layer + "attention.norm") | norm(layer + "mlp.norm")
            state |= linear(layer + "attention.qkv", width, 3 * width) | linear(layer + "attention.proj", width, width)
            state |= linear(layer + "mlp.main.0", width, 4 * width) | linear(layer + "mlp.main.2", 4 * width, width)
    return {f"module.{name}": value for name, value in state.items()}


def plain_log_prob(state: State, x: Tensor, label: int | None, *, blocks: int, layers: int) -> float:
    """log p of one image x (c, h, w) in [-0.5, 0.5) under `published_layout`, written straight down.

    As the published code does it: images in [-1, 1], means over dimensions, parameters shifted by one token, every
    second block backwards, the attention masked by the file's own mask.
    """
    w = {name.removeprefix("module."): value.double() for name, value in state.items()}
    side = x.shape[1]
    patch = side // math.isqrt(len(w["var"]))
    cut = [
        (2 * x.double())[:, top : top + patch, left : left + patch].flatten()
        for top in range(0, side, patch)
        for left in range(0, side, patch)
    ]
    z, log_det = torch.stack(cut), 0.0  # (t, d), a mean over dimensions
    for k in range(blocks):
        name = f"blocks.{k}."
        order = list(range(len(z)))[:: -1 if k % 2 else 1]
        z, places = z[order], w[name + "pos_embed"][order]
        h = z @ w[name + "proj_in.weight"].T + w[name + "proj_in.bias"] + places
        if name + "class_embed" in w:
            classes = w[name + "class_embed"][:, 0]
            h = h + (classes.mean(0) if label is None else classes[label])
        for index in range(layers):
            layer = f"{name}attn_blocks.{index}."
            h = h + plain_attention(w, layer + "attention.", h, w[name + "attn_mask"])
            n = normed(w, layer + "mlp.norm", h)
            n = F.gelu(n @ w[layer + "mlp.main.0.weight"].T + w[layer + "mlp.main.0.bias"])
            h = h + n @ w[layer + "mlp.main.2.weight"].T + w[layer + "mlp.main.2.bias"]
        out = h @ w[name + "proj_out.weight"].T + w[name + "proj_out.bias"]
        out = torch.cat([torch.zeros_like(out[:1]), out[:-1]])
        a, b = out.chunk(2, dim=1) if out.shape[1] > z.shape[1] else (torch.zeros_like(out), out)
        z = ((z - b) * torch.exp(-a))[order]
        log_det = log_det - float(a.mean())
    dims = z.numel()
    prior = -0.5 * (z.square() / w["var"] + w["var"].log() + math.log(2 * math.pi)).mean()
    return dims * (float(prior) + log_det) + dims * math.log(2)  # nats, of x and not of 2 x


def plain_attention(w: State, name: str, h: Tensor, mask: Tensor) -> Tensor:
    """Masked attention with heads of 64."""
    qkv = normed(w, name + "norm", h) @ w[name + "qkv.weight"].T + w[name + "qkv.bias"]
    q, k, v = qkv.chunk(3, dim=1)
    heads = []
    for first in range(0, q.shape[1], 64):
        part = slice(first, first + 64)
        logits = q[:, part] @ k[:, part].T / 8  # sqrt(64)
        heads.append(logits.masked_fill(mask == 0, -math.inf).softmax(dim=1) @ v[:, part])
    return torch.cat(heads, dim=1) @ w[name + "proj.weight"].T + w[name + "proj.bias"]


def normed(w: State, name: str, h: Tensor) -> Tensor:
    """Layer normalisation."""
    centred = h - h.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * w[name + ".weight"] + w[name + ".bias"]


def image(channels: int, side: int) -> Tensor:
    """One input."""
    return torch.rand(channels, side, side, generator=generator(8)) - 0.5


@pytest.mark.parametrize("kind", ["pt", "safetensors", "bare"])
@pytest.mark.parametrize(
    ("layout", "facts"),
    [
        ({}, {"n_classes": 0}),
        ({"classes": 3, "width": 128, "blocks": 3, "layers": 2}, {"n_classes": 3, "width": 128, "n_layer": 2}),
        ({"channels": 1, "patch": 3, "rows": 3}, {"patch_size": 3}),
        ({"volume_preserving": True}, {}),
    ],
)
def test_the_published_layout_gives_the_numbers_of_a_plain_implementation(
    tmp_path: Path, kind: str, layout: dict[str, Any], facts: dict[str, Any]
) -> None:
    state = published_layout(**layout)
    channels, blocks, layers = layout.get("channels", 3), layout.get("blocks", 2), layout.get("layers", 1)
    side = layout.get("patch", 2) * layout.get("rows", 2)
    if kind == "safetensors":
        save_file(state, tmp_path / "source")
    elif kind == "pt":
        torch.save(state, tmp_path / "source")
    else:
        torch.save({name.removeprefix("module."): value for name, value in state.items()}, tmp_path / "source")
    x = image(channels, side)

    manifest = convert(tmp_path / "source", tmp_path / "out.safetensors", noise_std=0.07)

    assert (manifest.family, manifest.channels, manifest.image_size, manifest.n_bits) == ("tarflow", channels, side, 8)
    assert manifest.architecture == manifest.architecture | facts
    assert manifest.architecture["noise_std"] == pytest.approx(0.035)
    flow = load_flow(tmp_path / "out.safetensors")
    assert isinstance(flow, TarFlow)
    assert not any("attn_mask" in name for name in flow.state_dict())
    found = float(flow.log_prob(x[None]).detach())
    assert found == pytest.approx(plain_log_prob(state, x, None, blocks=blocks, layers=layers), rel=1e-4, abs=1e-3)
    if layout.get("classes"):
        found = float(flow.log_prob(x[None], 2).detach())
        assert found == pytest.approx(plain_log_prob(state, x, 2, blocks=blocks, layers=layers), rel=1e-4, abs=1e-3)


def test_the_noise_is_asked_for(tmp_path: Path) -> None:
    torch.save(published_layout(), tmp_path / "a.pt")

    with pytest.raises(MissingFactError, match="noise_std"):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_a_file_without_variances_has_variances_of_one(tmp_path: Path) -> None:
    state = published_layout()
    del state["module.var"]
    torch.save(state, tmp_path / "a.pt")

    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", noise_std=0.0)

    assert bool((load_flow(tmp_path / "b.safetensors").var == 1).all())  # type: ignore[attr-defined]  # a TarFlow's


@pytest.mark.parametrize(
    ("change", "stated", "error", "says"),
    [
        ({}, {"image_size": 8}, TensorMismatchError, "stated as 8; the shapes are those of 4"),
        ({}, {"family": "glow", "image_size": 4, "n_bits": 8}, TensorMismatchError, "no Glow weights"),
        ({}, {"family": "maf"}, UnknownFamilyError, "no foreign layout"),
        ({}, {"noise_std": -1.0}, CheckpointError, "noise_std"),
        ({"module.blocks.1.odd": torch.zeros(1)}, {}, TensorMismatchError, "blocks.1.odd"),
        ({"module.blocks.1.proj_in.bias": torch.full((64,), math.nan)}, {}, NonFiniteError, "blocks.1.proj_in.bias"),
        ({"module.blocks.0.pos_embed": torch.zeros(3, 64)}, {}, TensorMismatchError, "3 tokens of 12 values"),
        ({"module.blocks.0.proj_in.weight": torch.zeros(64, 7)}, {}, TensorMismatchError, "4 tokens of 7 values"),
        ({"module.blocks.0.proj_in.weight": torch.zeros(20, 12)}, {}, TensorMismatchError, "no multiple of 64"),
        ({"module.blocks.0.proj_in.weight": torch.zeros(64)}, {}, TensorMismatchError, "2 dimensions"),
        ({"module.blocks.99999.attn_blocks.0.x": torch.zeros(1)}, {}, TensorMismatchError, "99999"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused(
    tmp_path: Path, change: State, stated: dict[str, Any], error: type[CheckpointError], says: str
) -> None:
    torch.save(published_layout() | change, tmp_path / "a.pt")

    with pytest.raises(error, match=says):
        convert(tmp_path / "a.pt", tmp_path / "b.safetensors", **({"noise_std": 0.1} | stated))
    assert not (tmp_path / "b.safetensors").exists()


def test_our_own_file_is_held_against_the_noise_that_is_stated(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.safetensors", TarFlow((1, 4, 4), 8, width=8, noise_std=0.05, generator=generator()))

    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", noise_std=0.1)

    with pytest.raises(ManifestError, match=r"stated as 0\.05 .* says 0\.1"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", noise_std=0.05)


def test_an_imported_flow_is_probed_as_any_other(tmp_path: Path) -> None:
    state = {name: value * 0.1 if "proj_out" in name else value for name, value in published_layout().items()}
    torch.save(state, tmp_path / "a.pt")

    convert(tmp_path / "a.pt", tmp_path / "b.safetensors", noise_std=0.1)

    probe(load_flow(tmp_path / "b.safetensors"))
