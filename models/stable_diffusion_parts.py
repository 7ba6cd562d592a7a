"""What a Stable Diffusion model is made of: the configurations that this release takes, and the networks of them.

A configuration is a stranger's: every field that we know has a range, and is checked before anything is built. Fields
of diffusers that are not in the tables here must have the value that leaves them without effect, as in SD 1.x and 2.x.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from models.architecture import check_ranges
from models.errors import ArchitectureError
from models.tensor_files import quoted

__all__ = [
    "TEXT_ENCODER",
    "UNET",
    "VAE",
    "adopted",
    "check_together",
    "checked",
    "text_encoder_of",
    "unet_of",
    "vae_of",
]

Check = Callable[[str, Any], Any]
"""The value of a named field as it is used; raises ArchitectureError where it is none."""

MAX_LEVELS = 6
MAX_WIDTH = 4096
MAX_VOCABULARY = 2**20
ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")


def _whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        check_ranges({name: (value, low, high)})
        return int(value)

    return check


def _number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
            raise ArchitectureError(f"{name} must be a number above {low:g}, at most {high:g}, not {quoted(value)}")
        return float(value)

    return check


def _one_of(*choices: object) -> Check:
    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ArchitectureError(f"{name} must be one of {', '.join(map(repr, choices))}, not {quoted(value)}")
        return value

    return check


def _levels(each: Check) -> Check:
    """A list, a value for each level."""

    def check(name: str, value: Any) -> list[Any]:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= MAX_LEVELS:
            raise ArchitectureError(f"{name} must be a list of 1 to {MAX_LEVELS} values, not {quoted(value)}")
        return [each(f"{name}[{level}]", one) for level, one in enumerate(value)]

    return check


def _side(name: str, value: Any) -> int:
    """A square's."""
    if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return int(_whole(1, 1024)(name, value))


def _heads(name: str, value: Any) -> Any:
    """One number for all levels, or one each."""
    each = _whole(1, 256)
    return _levels(each)(name, value) if isinstance(value, list | tuple) else each(name, value)


Fields = Mapping[str, tuple[Any, Check]]
"""The default of a field, None where it must be given, and its check."""

UNET: Fields = {
    "sample_size": (None, _side),
    "in_channels": (4, _whole(1, 64)),
    "out_channels": (4, _whole(1, 64)),
    "block_out_channels": (None, _levels(_whole(1, MAX_WIDTH))),
    "down_block_types": (None, _levels(_one_of("CrossAttnDownBlock2D", "DownBlock2D"))),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", _one_of("UNetMidBlock2DCrossAttn", None)),
    "up_block_types": (None, _levels(_one_of("CrossAttnUpBlock2D", "UpBlock2D"))),
    "layers_per_block": (2, _whole(1, 8)),
    "cross_attention_dim": (None, _whole(1, MAX_WIDTH)),
    "attention_head_dim": (8, _heads),  # the number of heads, whatever diffusers calls it
    "use_linear_projection": (False, _one_of(True, False)),
    "upcast_attention": (False, _one_of(True, False)),
    "norm_num_groups": (32, _whole(1, 256)),
    "norm_eps": (1e-5, _number(0, 1)),
    "act_fn": ("silu", _one_of(*ACTIVATIONS)),
}
VAE: Fields = {
    "in_channels": (3, _whole(1, 4)),
    "out_channels": (3, _whole(1, 4)),
    "block_out_channels": (None, _levels(_whole(1, MAX_WIDTH))),
    "down_block_types": (None, _levels(_one_of("DownEncoderBlock2D"))),
    "up_block_types": (None, _levels(_one_of("UpDecoderBlock2D"))),
    "layers_per_block": (1, _whole(1, 8)),
    "latent_channels": (4, _whole(1, 64)),
    "norm_num_groups": (32, _whole(1, 256)),
    "act_fn": ("silu", _one_of(*ACTIVATIONS)),
    "sample_size": (32, _side),
    "scaling_factor": (0.18215, _number(0, 1e6)),
}
TEXT_ENCODER: Fields = {
    "vocab_size": (49408, _whole(1, MAX_VOCABULARY)),
    "hidden_size": (512, _whole(1, MAX_WIDTH)),
    "intermediate_size": (2048, _whole(1, 4 * MAX_WIDTH)),
    "num_hidden_layers": (12, _whole(1, 64)),
    "num_attention_heads": (8, _whole(1, 256)),
    "max_position_embeddings": (77, _whole(3, 1024)),
    "hidden_act": ("quick_gelu", _one_of("quick_gelu", *ACTIVATIONS)),
    "layer_norm_eps": (1e-5, _number(0, 1)),
    "bos_token_id": (0, _whole(0, MAX_VOCABULARY)),
    "eos_token_id": (2, _whole(0, MAX_VOCABULARY)),
    "pad_token_id": (1, _whole(0, MAX_VOCABULARY)),
}
"""Defaults are those of the classes of diffusers and transformers."""


def checked(part: str, config: Mapping[str, Any], fields: Fields) -> dict[str, Any]:
    """A configuration with every field, each within its range, as JSON values.

    Raises:
        ArchitectureError: a field is unknown, missing or out of range.
    """
    if not isinstance(config, Mapping):
        raise ArchitectureError(f"the {part}'s configuration is an object, not {quoted(config)}")
    if odd := sorted(map(str, config.keys() - fields.keys())):
        raise ArchitectureError(f"the {part}'s configuration has the unknown fields {quoted(odd)}; leave them out")
    found = {}
    for name, (default, check) in fields.items():
        if name not in config and default is None:
            raise ArchitectureError(f"the {part}'s configuration lacks {name}")
        found[name] = check(f"the {part}'s {name}", config.get(name, default))
    return found


def adopted(part: str, config: Mapping[str, Any], fields: Fields, model: type | None) -> dict[str, Any]:
    """A foreign configuration cut to the fields that we have, where the others have no effect.

    Args:
        part: its name for messages.
        config: as diffusers or transformers wrote it.
        fields: those that we have.
        model: the class that diffusers would build; a field of it that we do not have must have its default. None
            where other fields concern nothing that is used here.

    Raises:
        ArchitectureError: a field is set that this family does not have, such as those of SDXL.
    """
    if not isinstance(config, Mapping):
        raise ArchitectureError(f"the {part}'s configuration is an object, not {quoted(config)}")
    parameters = inspect.signature(model).parameters if model is not None else {}
    for name, parameter in parameters.items():
        value = config.get(name, parameter.default)
        if name not in fields and value != parameter.default and value is not None and value is not False:
            raise ArchitectureError(
                f"the {part}'s configuration sets {name} to {quoted(value)}, which the models of the Stable Diffusion "
                "1.x and 2.x kind do not have; SDXL, distilled, upscaling and class-conditional ones are not supported"
            )
    return checked(part, {name: config[name] for name in fields if name in config}, fields)


def check_together(
    unet: Mapping[str, Any], vae: Mapping[str, Any], text_encoder: Mapping[str, Any], image_shape: Sequence[int]
) -> None:
    """Hold the parts against each other.

    Raises:
        ArchitectureError: they do not make one model, or one of other images.
    """
    levels = len(unet["block_out_channels"])
    heads = unet["attention_head_dim"]
    for name in ("down_block_types", "up_block_types", *(["attention_head_dim"] if isinstance(heads, list) else [])):
        if len(unet[name]) != levels:
            raise ArchitectureError(f"the U-Net's {name} has {len(unet[name])} values; the U-Net has {levels} levels")
    for width, count in zip(
        unet["block_out_channels"], heads if isinstance(heads, list) else [heads] * levels, strict=True
    ):
        _divides("U-Net's", width, {"attention_head_dim": count, "norm_num_groups": unet["norm_num_groups"]})
    for width in vae["block_out_channels"]:
        _divides("VAE's", width, {"norm_num_groups": vae["norm_num_groups"]})
    for name in ("down_block_types", "up_block_types"):
        if len(vae[name]) != len(vae["block_out_channels"]):
            raise ArchitectureError(f"the VAE's {name} has {len(vae[name])} values, another number than its levels")
    _divides(
        "text encoder's", text_encoder["hidden_size"], {"num_attention_heads": text_encoder["num_attention_heads"]}
    )
    if unet["in_channels"] != vae["latent_channels"]:
        raise ArchitectureError(
            f"the U-Net reads {unet['in_channels']} channels and the VAE's latents have {vae['latent_channels']}: an "
            "inpainting, upscaling or editing model, whose input is more than a prompt; give a text-to-image model"
        )
    if unet["out_channels"] != vae["latent_channels"]:
        raise ArchitectureError(
            f"the U-Net answers {unet['out_channels']} channels, the latents have {vae['latent_channels']}"
        )
    if unet["cross_attention_dim"] != text_encoder["hidden_size"]:
        raise ArchitectureError(
            f"the U-Net's cross_attention_dim is {unet['cross_attention_dim']}, the text encoder's hidden_size is "
            f"{text_encoder['hidden_size']}: they do not belong together"
        )
    side = unet["sample_size"] * scale_of(vae)
    expected = (vae["in_channels"], side, side)
    if vae["out_channels"] != vae["in_channels"] or tuple(image_shape) != expected:
        raise ArchitectureError(
            f"the U-Net's sample_size and the VAE make images of {expected}, not of {tuple(image_shape)}"
        )
    if side % 2 ** (levels - 1 + int(math.log2(scale_of(vae)))):
        raise ArchitectureError(f"a latent of {unet['sample_size']} a side cannot be halved {levels - 1} times")


def scale_of(vae: Mapping[str, Any]) -> int:
    """Pixels a side for one latent position."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def unet_of(config: Mapping[str, Any]) -> Any:
    """The U-Net of a checked configuration."""
    return _built("U-Net", lambda: UNet2DConditionModel(**config))


def vae_of(config: Mapping[str, Any]) -> Any:
    """The VAE of a checked configuration."""
    return _built("VAE", lambda: AutoencoderKL(**config))


def text_encoder_of(config: Mapping[str, Any]) -> Any:
    """The text encoder of a checked configuration; its positions are counted on the CPU, since no file holds them."""
    encoder = _built("text encoder", lambda: CLIPTextModel(CLIPTextConfig(**config, attention_dropout=0.0)))
    with torch.device("cpu"):
        encoder.embeddings.position_ids = torch.arange(config["max_position_embeddings"])[None]
    return encoder


def _built(part: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except Exception as error:  # whatever diffusers raises on sizes that pass each range and fit no network
        raise ArchitectureError(f"no {part} can be built of its configuration: {quoted(error)}") from error


def _divides(whose: str, width: int, divisors: Mapping[str, int]) -> None:
    for name, value in divisors.items():
        if width % value:
            raise ArchitectureError(f"the {whose} width {width} is no multiple of its {name}, {value}")
