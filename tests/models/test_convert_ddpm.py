"""The layout of diffusers' U-Net over classes, in and out of both file formats, and what does not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints import load_conditional
from models.convert import convert
from models.ddpm import ClassDDPM
from models.errors import ArchitectureError, CheckpointError, MissingFactError, TensorMismatchError
from tests.models.flow_table import generator

CLASSES, SIDE = 3, 8


def network(**sizes: Any) -> UNet2DModel:
    """As its users build it, with every parameter somewhere."""
    plain = {
        "sample_size": SIDE, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": CLASSES + 1,
    }  # fmt: skip
    with torch.random.fork_rng():
        model = UNet2DModel(**{**plain, **sizes})
    draws = generator(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=draws))
    return model


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network().state_dict().items()}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift", "layers_per_block": 2},
        {"add_attention": False, "block_out_channels": (32,), "down_block_types": ("DownBlock2D",),
         "up_block_types": ("UpBlock2D",), "in_channels": 3, "out_channels": 3},
    ],
    ids=["plain", "film", "one level in colour"],
)  # fmt: skip
def test_the_converted_model_answers_what_the_network_does(
    sizes: dict[str, Any], kind: str, prefix: str, tmp_path: Path
) -> None:
    theirs, source = network(**sizes).eval(), tmp_path / "source"
    state = {f"{prefix}{name}": value for name, value in theirs.state_dict().items()}
    save_file(state, source) if kind == "safetensors" else torch.save(state, source)

    manifest = convert(source, tmp_path / "out.safetensors", image_size=SIDE)

    ours = load_conditional(tmp_path / "out.safetensors")
    assert isinstance(ours, ClassDDPM)
    assert (manifest.family, manifest.n_bits, manifest.architecture["n_classes"]) == ("ddpm", 8, CLASSES)
    assert manifest.extra["assumed"]["norm_groups"] == 32
    x = torch.rand(4, *ours.image_shape, generator=generator()) * 2 - 1
    labels = torch.tensor([0, 1, 2, -1])
    steps, noise = ours.draw(4, generator=generator(1))
    with torch.no_grad():
        noisy = ours.diffusion.noised(x, steps, noise)
        answer = theirs(noisy, steps, class_labels=torch.tensor([0, 1, 2, CLASSES])).sample
        expected = (answer - noise).square().sum((1, 2, 3))
        torch.testing.assert_close(ours.losses(x, labels, (steps, noise)), expected)


def test_old_names_of_attention_are_read(published: dict[str, Tensor], tmp_path: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in published.items():
        for ours, theirs in old.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        state[name] = value
    save_file(state, tmp_path / "source")

    manifest = convert(tmp_path / "source", tmp_path / "out.safetensors", image_size=SIDE)

    assert (manifest.architecture["attention"], manifest.architecture["middle_attention"]) == ([False, True], True)


def test_what_shapes_do_not_tell_is_taken_as_stated(published: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(published, tmp_path / "source")

    manifest = convert(
        tmp_path / "source", tmp_path / "out.safetensors", image_size=16, n_bits=5, prediction_type="v_prediction"
    )

    assert (manifest.image_size, manifest.n_bits) == (16, 5)
    assert manifest.architecture["scheduler"]["prediction_type"] == "v_prediction"


def test_without_an_image_size_it_is_asked_for(published: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(published, tmp_path / "source")

    with pytest.raises(MissingFactError, match="does not tell image_size"):
        convert(tmp_path / "source", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"class_embedding.weight": None}, TensorMismatchError, "knows no classes.*num_class_embeds = classes"),
        ({"class_embedding.weight": torch.zeros(1, 128)}, TensorMismatchError, "one row"),
        ({"class_embedding.weight": torch.zeros(4)}, TensorMismatchError, "needs 2 dimensions"),
        ({"conv_in.bias": None}, TensorMismatchError, "unet.conv_in.bias"),
        ({"skip.weight": torch.zeros(2)}, TensorMismatchError, "do not belong"),
        ({"conv_out.weight": torch.zeros(2, 32, 3, 3)}, TensorMismatchError, "unet.conv_out.weight has shape"),
        (
            {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(48, 32, 3, 3)},
            ArchitectureError,
            "48 wide.*norm_groups",
        ),
        ({"down_blocks.999999.resnets.0.conv1.weight": torch.zeros(1)}, TensorMismatchError, "index 999999"),
    ],
)
def test_what_makes_no_such_model_is_refused(
    change: dict[str, Tensor | None],
    error: type[CheckpointError],
    message: str,
    published: dict[str, Tensor],
    tmp_path: Path,
) -> None:
    state = {name: value for name, value in (published | change).items() if value is not None}
    save_file(state, tmp_path / "source")

    with pytest.raises(error, match=message):
        convert(tmp_path / "source", tmp_path / "out.safetensors", image_size=SIDE)
