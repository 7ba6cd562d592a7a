"""What a Stable Diffusion model is made of: the configurations that this release takes, and the networks of them.

A configuration is a stranger's: every field that we know has a range, and is checked before anything is built. Fields
of diffusers that are not in the tables here must have the value that leaves them without effect, as in SD 1.x and XL.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from models.architecture import check_ranges
from models.errors import ArchitectureError
from models.tensor_files import quoted

__all__ = ["PARTS", "PARTS_XL", "Part", "adopted", "check_together", "checked", "unet_of"]

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


def _one_or_each(each: Check) -> Check:
    """One value for all levels, or one each."""

    def check(name: str, value: Any) -> Any:
        return _levels(each)(name, value) if isinstance(value, list | tuple) else each(name, value)

    return check


def _switch(name: str, value: Any) -> bool:
    """On or off; SDXL writes null for the latter."""
    return bool(_one_of(True, False)(name, False if value is None else value))


def _text_time(name: str, value: Any) -> str:
    if value != "text_time":
        raise ArchitectureError(f"{name} is {quoted(value)}, and SDXL's is 'text_time': it is no U-Net of SDXL")
    return str(value)


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
    "attention_head_dim": (8, _one_or_each(_whole(1, 256))),  # the number of heads, whatever diffusers calls it
    "use_linear_projection": (False, _one_of(True, False)),
    "upcast_attention": (False, _switch),
    "norm_num_groups": (32, _whole(1, 256)),
    "norm_eps": (1e-5, _number(0, 1)),
    "act_fn": ("silu", _one_of(*ACTIVATIONS)),
}
UNET_XL: Fields = {
    **UNET,
    "transformer_layers_per_block": (1, _one_or_each(_whole(1, 32))),
    "addition_embed_type": ("none", _text_time),
    "addition_time_embed_dim": (None, _whole(2, MAX_WIDTH)),
    "projection_class_embeddings_input_dim": (None, _whole(1, 16 * MAX_WIDTH)),
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
TEXT_ENCODER_2: Fields = {**TEXT_ENCODER, "projection_dim": (512, _whole(1, MAX_WIDTH))}


@dataclass(frozen=True)
class Part:
    """A network of a pipeline."""

    called: str
    """In messages."""
    fields: Fields
    kind: type
    """Its class."""
    build: Callable[[Mapping[str, Any]], Any]
    """The network of a checked configuration."""

    @property
    def written(self) -> list[str]:
        """As a pipeline's index names its class: library and name."""
        return [self.kind.__module__.partition(".")[0], self.kind.__name__]


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


def adopted(part: Part, config: Mapping[str, Any], whose: str) -> dict[str, Any]:
    """A foreign configuration cut to the fields that we have, where the others have no effect.

    Args:
        part: which it is of. A field of a class of diffusers that we do not have must have its default; those of a text
            encoder concern nothing that is used here.
        config: as diffusers or transformers wrote it.
        whose: the kind of model, for messages.

    Raises:
        ArchitectureError: a field is set that this family does not have, such as those of SDXL.
    """
    if not isinstance(config, Mapping):
        raise ArchitectureError(f"the {part.called}'s configuration is an object, not {quoted(config)}")
    library, _ = part.written
    parameters = inspect.signature(part.kind).parameters if library == "diffusers" else {}
    for name, parameter in parameters.items():
        value = config.get(name, parameter.default)
        off = value is None or (value is False and parameter.default is None)
        if name not in (*part.fields, *OF_NO_WEIGHT) and value != parameter.default and not off:
            raise ArchitectureError(
                f"the {part.called}'s configuration sets {name} to {quoted(value)}, which models of the kind {whose} "
                "do not have; distilled, upscaling and class-conditional ones are not supported, and of SDXL the whole "
                "base pipeline is needed"
            )
    return checked(part.called, {name: config[name] for name in part.fields if name in config}, part.fields)


def check_together(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    text_encoders: Sequence[Mapping[str, Any]],
    image_shape: Sequence[int],
) -> None:
    """Hold the parts against each other; the U-Net reads what the text encoders say of a token side by side.

    Raises:
        ArchitectureError: they do not make one model, or one of other images.
    """
    levels = len(unet["block_out_channels"])
    heads = unet["attention_head_dim"]
    each = ("attention_head_dim", "transformer_layers_per_block")
    for name in ("down_block_types", "up_block_types", *(one for one in each if isinstance(unet.get(one), list))):
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
    for one in text_encoders:
        _divides("text encoder's", one["hidden_size"], {"num_attention_heads": one["num_attention_heads"]})
    if unet["in_channels"] != vae["latent_channels"]:
        raise ArchitectureError(
            f"the U-Net reads {unet['in_channels']} channels and the VAE's latents have {vae['latent_channels']}: an "
            "inpainting, upscaling or editing model, whose input is more than a prompt; give a text-to-image model"
        )
    if unet["out_channels"] != vae["latent_channels"]:
        raise ArchitectureError(
            f"the U-Net answers {unet['out_channels']} channels, the latents have {vae['latent_channels']}"
        )
    widths = [one["hidden_size"] for one in text_encoders]
    if unet["cross_attention_dim"] != sum(widths):
        raise ArchitectureError(
            f"the U-Net's cross_attention_dim is {unet['cross_attention_dim']}, the text encoder's hidden_size is "
            f"{' + '.join(map(str, widths))}: they do not belong together"
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


def _vae_of(config: Mapping[str, Any]) -> Any:
    return _built("VAE", lambda: AutoencoderKL(**config))


def _text_encoder_of(kind: Callable[[CLIPTextConfig], Any], config: Mapping[str, Any]) -> Any:
    """A text encoder, whose positions are counted on the CPU, since no file holds them."""
    encoder = _built("text encoder", lambda: kind(CLIPTextConfig(**config, attention_dropout=0.0)))
    with torch.device("cpu"):
        embeddings = getattr(encoder, "text_model", encoder).embeddings
        embeddings.position_ids = torch.arange(config["max_position_embeddings"])[None]
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


OF_NO_WEIGHT = ("force_upcast",)
"""Fields that say how to compute in half precision, which is not done here."""

PARTS = {
    "unet": Part("U-Net", UNET, UNet2DConditionModel, unet_of),
    "vae": Part("VAE", VAE, AutoencoderKL, _vae_of),
    "text_encoder": Part("text encoder", TEXT_ENCODER, CLIPTextModel, partial(_text_encoder_of, CLIPTextModel)),
}
"""Of Stable Diffusion 1.x and 2.x."""
PARTS_XL = {
    **PARTS,
    "unet": Part("U-Net", UNET_XL, UNet2DConditionModel, unet_of),
    "text_encoder_2": Part(
        "second text encoder",
        TEXT_ENCODER_2,
        CLIPTextModelWithProjection,
        partial(_text_encoder_of, CLIPTextModelWithProjection),
    ),
}
"""Of Stable Diffusion XL."""
