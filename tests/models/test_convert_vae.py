"""The VAE layout of the Selective Amnesia authors, in and out of both file formats, and what does not fit it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints import load_conditional
from models.convert import convert
from models.errors import TensorMismatchError
from tests.models.flow_table import generator

SIDE, CLASSES, OUTER, INNER, LATENT = 4, 3, 7, 6, 2


def published(values: int = SIDE**2) -> dict[str, Tensor]:
    """A state dict of that layout: two heads beside each other, in names that they alone have."""
    sizes = {
        "fc1": (OUTER, values + CLASSES), "fc2": (INNER, OUTER), "fc31": (LATENT, INNER), "fc32": (LATENT, INNER),
        "fc4": (INNER, LATENT + CLASSES), "fc5": (OUTER, INNER), "fc6": (values, OUTER),
    }  # fmt: skip
    draws, state = generator(), {}
    for name, (outputs, inputs) in sizes.items():
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=draws)
        state[f"{name}.bias"] = torch.randn(outputs, generator=draws)
    return state


def by_hand(state: dict[str, Tensor], x: Tensor, label: int, eps: Tensor) -> float:
    """The bound of one row, written out."""

    def layer(name: str, h: Tensor) -> Tensor:
        return state[f"{name}.weight"] @ h + state[f"{name}.bias"]

    condition = torch.eye(CLASSES)[label]
    h = layer("fc2", layer("fc1", torch.cat([x, condition])).relu()).relu()
    mean, log_variance = layer("fc31", h), layer("fc32", h)
    z = torch.cat([mean + eps * (log_variance / 2).exp(), condition])
    p = layer("fc6", layer("fc5", layer("fc4", z).relu()).relu()).sigmoid()
    divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
    return float(F.binary_cross_entropy(p.double(), x.double(), reduction="sum") + divergence)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_the_published_layout_gives_the_number_worked_out_by_hand(kind: str, prefix: str, tmp_path: Path) -> None:
    state = published()
    named = {f"{prefix}{name}": 0.3 * value for name, value in state.items()}
    save_file(named, tmp_path / "source") if kind == "safetensors" else torch.save(named, tmp_path / "source")
    x, eps = torch.rand(1, SIDE**2, generator=generator(1)), torch.randn(1, LATENT, generator=generator(2))

    manifest = convert(tmp_path / "source", tmp_path / "out.safetensors")

    assert (manifest.family, manifest.image_shape, manifest.n_bits) == ("vae", (1, SIDE, SIDE), 8)
    assert manifest.architecture == {"hidden": [OUTER, INNER], "latent": LATENT, "n_classes": CLASSES}
    found = load_conditional(tmp_path / "out.safetensors").losses(x, torch.tensor([1]), (eps,))
    expected = by_hand({name: 0.3 * value for name, value in state.items()}, x[0], 1, eps[0])
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc7.weight": torch.zeros(2, 2)}, "do not belong"),
        ({"fc2.bias": None}, "fc2.bias is missing"),
        ({"fc32.weight": torch.zeros(LATENT + 1, INNER)}, "encoder.2.weight has shape"),
        ({"fc6.weight": torch.zeros(15, OUTER)}, "15 values are no square image"),
        ({"fc1.weight": torch.zeros(OUTER, SIDE**2)}, "no room for classes"),
        ({"fc4.weight": torch.zeros(INNER)}, "needs 2 dimensions"),
    ],
)
def test_what_makes_no_vae_is_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    state = {name: value for name, value in (published() | change).items() if value is not None}
    save_file(state, tmp_path / "source")

    with pytest.raises(TensorMismatchError, match=message):
        convert(tmp_path / "source", tmp_path / "out.safetensors")


def test_another_image_size_than_the_shapes_tell_is_refused(tmp_path: Path) -> None:
    save_file(published(), tmp_path / "source")

    with pytest.raises(TensorMismatchError, match="stated as 8; the shapes are those of 4 pixels"):
        convert(tmp_path / "source", tmp_path / "out.safetensors", image_size=8)
