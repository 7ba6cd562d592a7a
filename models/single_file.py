"""Stable Diffusion as one safetensors file of the CompVis layout, without configuration or tokenizer: read as ours.

Shapes tell every width; what they do not tell (heads, groups, the noise schedule) is that of SD 1.x or 2.x, which are
told apart by their text encoders. Whether a 2.x model predicts noise or velocity is not in its tensors at all.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from models.clip_vocabulary import SIZE, clip_vocabulary
from models.errors import ArchitectureError, ManifestError, MissingFactError, TensorMismatchError, UnknownFamilyError
from models.single_file_names import CLIP, OPEN_CLIP, UNET, VAE, clip_name, open_clip_name, unet_name, vae_name
from models.stable_diffusion import StableDiffusion
from models.stable_diffusion_parts import MAX_LEVELS, scale_of
from models.stable_diffusion_state import TokenizerFiles, assembled, renamed
from models.tensor_files import Extent, quoted, read_header

__all__ = ["import_single_file", "load_single_file"]

CONFIGS = Path(__file__).parent / "sd_configs"
HEAD_WIDTH = 64
"""Of all attention heads of both text encoders, and of SD 2.x's U-Net; SD 1.x's has 8 heads at every width."""
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""By what a caller states, or the file's metadata (modelspec.prediction_type)."""
SPLIT = ".self_attn.in_proj."

Shapes = Mapping[str, tuple[int, ...]]


def load_single_file(
    path: Path | str, *, prediction_type: str | None = None, image_size: int | None = None
) -> StableDiffusion:
    """The model in a file; see `import_single_file`."""
    return import_single_file(path, prediction_type=prediction_type, image_size=image_size)[0]


def import_single_file(
    path: Path | str, *, prediction_type: str | None = None, image_size: int | None = None
) -> tuple[StableDiffusion, dict[str, Any]]:
    """The model in a file, beside facts for the manifest.

    Args:
        path: a safetensors file.
        prediction_type: "epsilon" or "v_prediction", where the file does not say it; SD 1.x is taken to be the former.
        image_size: pixels a side, where it is another than that of the family (512; 768 with velocity in SD 2.x).

    Raises:
        MissingFactError: SD 2.x, and nobody says what it predicts.
        CheckpointError: another leaf of that tree says what is wrong and what to do.
    """
    file = Extent.whole(path)
    header = read_header(file)
    shapes = {name: shape for name, (_, shape) in header.tensors.items()}
    _check_parts(shapes)
    second = any(name.startswith(OPEN_CLIP) for name in shapes)
    prediction = _prediction(header.metadata, prediction_type, second)
    template = _template("sd1" if not second else "sd2-v" if prediction == "v_prediction" else "sd2-epsilon")
    try:
        configs: dict[str, Any] = {
            "unet": {**template["unet"], **_unet_told(_below(shapes, UNET))},
            "vae": {**template["vae"], **_vae_told(_below(shapes, VAE))},
            "text_encoder": {
                **template["text_encoder"],
                **_text_told(_below(shapes, OPEN_CLIP if second else CLIP), second),
            },
            "scheduler": {**template["scheduler"], "prediction_type": prediction},
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise TensorMismatchError(
            f"the file is not of the layout that its names promise: {quoted(str(error))} is missing or of an odd shape"
        ) from error
    _set_size(configs, image_size)
    vocab_size = configs["text_encoder"]["vocab_size"]
    if vocab_size != SIZE:
        raise ArchitectureError(
            f"the text encoder has {vocab_size:,} tokens and CLIP's vocabulary {SIZE:,}; the file does not carry its "
            "tokenizer: give the diffusers folder as a tar"
        )
    weights = renamed({"": file}, _renaming(configs), _reshaped)
    tokenizer = TokenizerFiles(*clip_vocabulary(), template["tokenizer"])
    model = assembled(StableDiffusion, configs, _split(weights), {"tokenizer": tokenizer})
    known = (UNET, VAE, CLIP, OPEN_CLIP)
    return model, {
        "converted_from": "single file",
        "left_out": sorted({name.partition(".")[0][:80] for name in shapes if not name.startswith(known)})[:20],
    }


@cache
def _template(name: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((CONFIGS / f"{name}.json").read_text()))


def _check_parts(shapes: Shapes) -> None:
    if any(name.startswith("conditioner.embedders.") for name in shapes):
        raise UnknownFamilyError(
            "the file holds an SDXL model, which is read from its diffusers folder alone: give that, as a plain tar"
        )
    parts = {"U-Net": (UNET,), "VAE": (VAE,), "text encoder": (CLIP, OPEN_CLIP)}
    missing = [part for part, prefixes in parts.items() if not any(name.startswith(prefixes) for name in shapes)]
    if "U-Net" in missing:
        raise UnknownFamilyError(
            "the file has no U-Net under the names of a single-file Stable Diffusion (model.diffusion_model.): a LoRA, "
            "a VAE or another family; give the whole checkpoint"
        )
    if missing:
        raise UnknownFamilyError(
            f"the file lacks the {' and the '.join(missing)}: a part of a Stable Diffusion 1.x or 2.x checkpoint, or "
            "another family; give the whole checkpoint, or a tar of the diffusers folder"
        )


def _prediction(metadata: Mapping[str, str], stated: str | None, second: bool) -> str:
    if stated is not None and stated not in PREDICTIONS:
        raise ArchitectureError(f"prediction_type is epsilon or v_prediction, not {quoted(stated)}")
    says = metadata.get("modelspec.prediction_type")
    if says is None and second:
        architecture = metadata.get("modelspec.architecture", "")
        says = {"stable-diffusion-v2-512": "epsilon", "stable-diffusion-v2-768-v": "v"}.get(architecture)
    if says is not None and says not in PREDICTIONS:
        raise ArchitectureError(f"the file's metadata say that it predicts {quoted(says)}, which is not supported")
    if stated is not None and says is not None and PREDICTIONS[stated] != PREDICTIONS[says]:
        raise ManifestError(f"prediction_type was stated as {stated!r}; the file's metadata say {says!r}")
    found = stated or says or (None if second else "epsilon")
    if found is None:
        raise MissingFactError(
            "the file does not tell prediction_type: Stable Diffusion 2.x comes as epsilon (the 512-base models) and "
            "as v_prediction (those for 768 pixels); state it and send the file again"
        )
    return PREDICTIONS[found]


def _unet_told(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of the U-Net tell."""
    levels = sum(bool(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", name)) for name in shapes) + 1
    blocks = len({name.split(".")[1] for name in shapes if name.startswith("input_blocks.")})
    layers = (blocks - levels) // levels
    if layers < 1 or levels > 6 or 1 + levels * layers + levels - 1 != blocks:
        raise TensorMismatchError(f"the U-Net has {blocks} input blocks on {levels} levels, which do not fit")
    first = [1 + level * (layers + 1) for level in range(levels)]
    widths = [shapes[f"input_blocks.{block}.0.out_layers.3.weight"][0] for block in first]
    down = [f"input_blocks.{block}.1.proj_in.weight" in shapes for block in first]
    up = [f"output_blocks.{level * (layers + 1)}.1.proj_in.weight" in shapes for level in range(levels)]
    linear = len(shapes["middle_block.1.proj_in.weight"]) == 2
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "block_out_channels": widths,
        "down_block_types": ["CrossAttnDownBlock2D" if one else "DownBlock2D" for one in down],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in up],
        "layers_per_block": layers,
        "cross_attention_dim": shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "use_linear_projection": linear,
        "attention_head_dim": [max(1, width // HEAD_WIDTH) for width in widths] if linear else 8,
    }


def _vae_told(shapes: Shapes) -> dict[str, Any]:
    """What the shapes of the VAE tell."""
    levels = len({name.split(".")[2] for name in shapes if name.startswith("encoder.down.")})
    if not 1 <= levels <= MAX_LEVELS:
        raise TensorMismatchError(f"the VAE has {levels} levels (encoder.down.*), not 1 to {MAX_LEVELS}")
    return {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "block_out_channels": [shapes[f"encoder.down.{level}.block.0.conv2.weight"][0] for level in range(levels)],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": len({name.split(".")[4] for name in shapes if name.startswith("encoder.down.0.block.")}),
        "latent_channels": shapes["post_quant_conv.weight"][0],
    }


def _text_told(shapes: Shapes, second: bool) -> dict[str, Any]:
    """What the shapes of the text encoder tell; of SD 2.x, the last block is not used."""
    if second:
        tokens, positions = shapes["token_embedding.weight"], shapes["positional_embedding"]
        layer, inner = r"transformer\.resblocks\.(\d+)\..+", shapes["transformer.resblocks.0.mlp.c_fc.weight"]
    else:
        shapes = {name.removeprefix("text_model."): shape for name, shape in shapes.items()}
        tokens, positions = shapes["embeddings.token_embedding.weight"], shapes["embeddings.position_embedding.weight"]
        layer, inner = r"encoder\.layers\.(\d+)\..+", shapes["encoder.layers.0.mlp.fc1.weight"]
    layers = len({match[1] for name in shapes if (match := re.fullmatch(layer, name))})
    return {
        "vocab_size": tokens[0],
        "hidden_size": tokens[1],
        "intermediate_size": inner[0],
        "num_hidden_layers": layers - 1 if second else layers,
        "num_attention_heads": max(1, tokens[1] // HEAD_WIDTH),
        "max_position_embeddings": positions[0],
    }


def _set_size(configs: dict[str, Any], image_size: int | None) -> None:
    """Give the latents the sides of the stated images."""
    scale = scale_of(configs["vae"])
    if image_size is None:
        return
    if image_size % scale:
        raise ArchitectureError(f"image_size is a multiple of {scale}, not {image_size}")
    configs["unet"]["sample_size"] = image_size // scale


def _renaming(configs: Mapping[str, Any]) -> Callable[[str], str | None]:
    """Our name of a tensor, by its whole name in the file; None for what is not of the three parts."""
    layers = configs["text_encoder"]["num_hidden_layers"]
    parts: dict[str, tuple[str, Callable[[str], str | None]]] = {
        UNET: ("unet", partial(unet_name, layers=configs["unet"]["layers_per_block"])),
        VAE: ("vae", partial(vae_name, levels=len(configs["vae"]["block_out_channels"]))),
        CLIP: ("text_encoder", clip_name),
        OPEN_CLIP: ("text_encoder", partial(open_clip_name, layers=layers)),
    }

    def rename(name: str) -> str | None:
        for prefix, (part, ours) in parts.items():
            if name.startswith(prefix):
                found = ours(name.removeprefix(prefix))
                return None if found is None else f"{part}.{found}"
        return None

    return rename


def _reshaped(name: str, value: Tensor) -> Tensor:
    """The VAE's attention is a convolution of one pixel there, and linear here."""
    if ".attentions.0.to_" in name and name.startswith("vae.") and value.shape[2:] == (1, 1):
        return value[:, :, 0, 0].contiguous()
    return value


def _split(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values that are one tensor as three.

    Raises:
        TensorMismatchError: such a tensor cannot be cut in three.
    """
    for name in [one for one in weights if SPLIT in one]:
        before, _, kind = name.partition(SPLIT)
        whole = weights.pop(name)
        if not whole.ndim or len(whole) % 3:
            raise TensorMismatchError(
                f"{quoted(name)} holds queries, keys and values, and its shape {tuple(whole.shape)} is not theirs"
            )
        for part, value in zip("qkv", whole.chunk(3), strict=True):
            weights[f"{before}.self_attn.{part}_proj.{kind}"] = value.clone()
    return weights


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
