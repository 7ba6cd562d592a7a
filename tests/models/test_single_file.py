"""Single-file Stable Diffusion: made here of a small model under the names of CompVis, read back, and refused."""

import importlib.metadata
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints import load_conditional
from models.clip_vocabulary import SIZE, clip_vocabulary
from models.convert import convert
from models.errors import CheckpointError, ManifestError, MissingFactError, UnknownFamilyError
from models.single_file import CONFIGS, load_single_file
from models.stable_diffusion import StableDiffusion
from tests.models import sd_cases

try:
    importlib.metadata.files("open-clip-torch")
except importlib.metadata.PackageNotFoundError:
    pytest.skip(
        "CLIP's vocabulary comes with open-clip-torch, installed without what it depends on", allow_module_level=True
    )

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
ENDS = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0", "conv_out": "out.2", "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}  # fmt: skip
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight", "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj", "self_attn": "attn",
}  # fmt: skip


def replaced(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\g<1>{new}\g<2>", name)
    return name


def compvis_unet(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        new = replaced(name, ENDS)
        if match := re.fullmatch(
            r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", name
        ):
            side, level, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            first = level * (layers + 1) + (side == "down")
            blocks = "input_blocks" if side == "down" else "output_blocks"
            if kind == "downsamplers":
                new = f"{blocks}.{first + layers}.0.{rest.replace('conv', 'op')}"
            elif kind == "upsamplers":
                attended = f"up_blocks.{level}.attentions.0.norm.weight" in state
                new = f"{blocks}.{first + layers}.{2 if attended else 1}.{rest}"
            else:
                new = f"{blocks}.{first + layer}.{int(kind == 'attentions')}.{rest}"
        if ".resnets." in name:
            new = replaced(new, RESNET)
        found[f"model.diffusion_model.{new}"] = value
    return found


def compvis_vae(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    found = {}
    for name, value in state.items():
        new = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        new = new.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        if "mid_block.attentions.0." in new:
            before, rest = new.split("mid_block.attentions.0.")
            new = f"{before}mid.attn_1.{replaced(rest, ATTENTION)}"
            value = value[:, :, None, None].contiguous() if value.ndim == 2 else value
        if match := re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d)\.(.+)", new):
            level = int(match[3]) if match[2] == "down" else levels - 1 - int(match[3])
            rest = match[4].replace("resnets", "block").replace("samplers.0", "sample")
            new = f"{match[1]}.{match[2]}.{level}.{rest}"
        found[f"first_stage_model.{new}"] = value
    return found


def compvis_text(state: Mapping[str, Tensor], second: bool) -> dict[str, Tensor]:
    if not second:
        prefix = "cond_stage_model.transformer.text_model."
        return {prefix + name: value for name, value in state.items()} | {
            f"{prefix}embeddings.position_ids": torch.arange(8)[None]
        }
    found = {replaced(name, OPEN_CLIP): value for name, value in state.items()}
    for name in [one for one in found if ".q_proj." in one]:
        parts = [found.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        found[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    last = max(int(name.split(".")[2]) for name in found if ".resblocks." in name)
    unused = {
        name.replace(f".{last}.", f".{last + 1}."): value.clone()
        for name, value in found.items()
        if f".{last}." in name
    }
    found |= unused | {"text_projection": torch.ones(64, 64), "logit_scale": torch.ones(())}
    return {f"cond_stage_model.model.{name}": value for name, value in found.items()}


@cache
def small(second: bool) -> StableDiffusion:
    """Of widths that heads of 64 and norms of 32 groups divide, with all of CLIP's tokens."""
    own: dict[str, Any] = (
        {"attention_head_dim": [1, 2], "use_linear_projection": True} if second else {"attention_head_dim": 8}
    )
    vocab, merges = clip_vocabulary()
    changes: dict[str, Any] = {
        "unet": {
            "block_out_channels": [64, 128] if second else [32, 64], "norm_num_groups": 32, "cross_attention_dim": 64,
            **own,
        },
        "vae": {"block_out_channels": [32, 32], "norm_num_groups": 32, "scaling_factor": 0.18215},
        "text_encoder": {
            "vocab_size": SIZE, "hidden_size": 64, "num_attention_heads": 1,
            "hidden_act": "gelu" if second else "quick_gelu",
        },
        "tokenizer": {"vocab_bytes": len(vocab), "merges_bytes": len(merges)},
        "scheduler": {"prediction_type": "v_prediction" if second else "epsilon"},
    }  # fmt: skip
    if not second:
        changes["tokenizer"]["pad_token"] = "<|endoftext|>"
    model = StableDiffusion(
        sd_cases.IMAGE_SHAPE, 8, **sd_cases.architecture(**changes), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    return model


@cache
def compvis(second: bool) -> Mapping[str, Tensor]:
    """The model's weights as a single file has them, with what such files carry beside them; not to be changed."""
    model = small(second)
    return {
        **compvis_unet(model.unet.state_dict(), 1),
        **compvis_vae(model.vae.state_dict(), 2),
        **compvis_text(model.text_encoder.state_dict(), second),
        "alphas_cumprod": torch.ones(1000),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["sd1", "sd2"])
def second(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def model(second: bool) -> StableDiffusion:
    return small(second)


@pytest.fixture(scope="module")
def tensors(second: bool) -> dict[str, Tensor]:
    return dict(compvis(second))


@pytest.fixture(scope="module")
def first_tensors() -> dict[str, Tensor]:
    return dict(compvis(False))


def told(second: bool) -> dict[str, Any]:
    return {"image_size": 8, **({"prediction_type": "v_prediction"} if second else {})}


def test_a_single_file_returns_the_model(
    model: StableDiffusion, tensors: dict[str, Tensor], second: bool, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")

    again = load_single_file(tmp_path / "a.safetensors", **told(second))

    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("tokenizer.")}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in weights.items())
    ours, theirs = again.architecture, model.architecture
    assert {**ours["unet"], "attention_head_dim": theirs["unet"]["attention_head_dim"]} == theirs["unet"]
    assert ours["text_encoder"] == theirs["text_encoder"]
    assert ours["scheduler"] == theirs["scheduler"]
    assert ours["tokenizer"] == theirs["tokenizer"]
    condition, generator = again.tokens(["a photo of a"]), torch.Generator().manual_seed(0)
    x, draws = torch.ones(1, 4, 4, 4), again.draw(1, generator=generator)
    assert torch.equal(again.losses(x, condition, draws), model.losses(x, condition, draws))


def test_names_and_shapes_become_those_that_diffusers_converts_to(
    model: StableDiffusion, tensors: dict[str, Tensor], second: bool, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    ours = load_single_file(tmp_path / "a.safetensors", **told(second)).state_dict()

    theirs = {
        f"unet.{name}": one for name, one in convert_ldm_unet_checkpoint(tensors, {"layers_per_block": 1}).items()
    }
    config = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    theirs |= {f"vae.{name}": one for name, one in convert_ldm_vae_checkpoint(tensors, config).items()}
    if not second:  # the last block of SD 2.x, which theirs leaves out by its number, has another one here
        text = convert_ldm_clip_checkpoint(tensors)
    else:
        text = convert_open_clip_checkpoint(model.text_encoder, tensors)
        text = {name: one for name, one in text.items() if "layers.2." not in name and "text_projection" not in name}
    names = {name: name.removeprefix("text_model.") for name in text if not name.endswith("position_ids")}
    theirs |= {f"text_encoder.{new}": text[name] for name, new in names.items()}

    assert theirs.keys() == {name for name in ours if not name.startswith("tokenizer.")}
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_half_precision_becomes_float32_and_our_checkpoint(
    tensors: dict[str, Tensor], second: bool, tmp_path: Path
) -> None:
    save_file({name: one.half() if one.is_floating_point() else one for name, one in tensors.items()}, tmp_path / "a")

    manifest = convert(tmp_path / "a", tmp_path / "b", **told(second))

    assert manifest.family == "stable-diffusion"
    assert manifest.extra["left_out"] == ["alphas_cumprod"]
    loaded = load_conditional(tmp_path / "b")
    assert isinstance(loaded, StableDiffusion)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("says", ["epsilon", "v"])
def test_the_files_metadata_tell_what_a_second_generation_predicts(says: str, tmp_path: Path) -> None:
    save_file(dict(compvis(True)), tmp_path / "a", metadata={"modelspec.prediction_type": says})

    model = load_single_file(tmp_path / "a", image_size=8)

    assert model.diffusion.config["prediction_type"] == {"epsilon": "epsilon", "v": "v_prediction"}[says]
    with pytest.raises(ManifestError, match="prediction_type was stated"):
        load_single_file(tmp_path / "a", prediction_type="v_prediction" if says == "epsilon" else "epsilon")


def test_what_a_second_generation_predicts_has_to_be_stated(tmp_path: Path) -> None:
    save_file(dict(compvis(True)), tmp_path / "a")

    with pytest.raises(MissingFactError, match="does not tell prediction_type"):
        convert(tmp_path / "a", tmp_path / "b")


def without(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one for name, one in tensors.items() if not name.startswith(prefix)}


def test_a_part_of_a_model_is_refused_by_what_it_lacks(first_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for prefix, part in (
        ("model.", "no U-Net"),
        ("first_stage_model.", "lacks the VAE"),
        ("cond_", "lacks the text encoder"),
    ):
        save_file(without(prefix, first_tensors), tmp_path / "a")
        with pytest.raises(UnknownFamilyError, match=part):
            convert(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"conditioner.embedders.0.transformer.x": torch.ones(1)}, "SDXL.*diffusers folder alone"),
        ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}, "reads 9 channels.*inpainting"),
        ({"model.diffusion_model.label_emb.0.0.weight": torch.ones(4, 4)}, "label_emb"),
        ({"model.diffusion_model.input_blocks.7777777.0.op.weight": torch.ones(4)}, "do not fit"),
        ({"model.diffusion_model.out.2.bias": torch.full((4,), torch.nan)}, "NaN"),
        ({"model.diffusion_model.out.2.bias": torch.ones(4, dtype=torch.int64)}, "no weight"),
        (
            {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(600, 64)},
            "600 tokens",
        ),
        ({"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(())}, "odd shape"),
        ({"first_stage_model.encoder.down.x.y": torch.ones(1)}, "odd shape"),
        ({"model.diffusion_model.middle_block.1.proj_in.weight": torch.ones(64, 64)}, "shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_file_of_another_model_is_refused(
    change: dict[str, Tensor], says: str, first_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file({**first_tensors, **change}, tmp_path / "a")

    with pytest.raises(CheckpointError, match=says):
        convert(tmp_path / "a", tmp_path / "b", image_size=8)


@pytest.mark.parametrize("shape", [(), (0,), (1, 64), (2, 64), (4, 64), (3,)], ids=str)
def test_queries_keys_and_values_that_cannot_be_told_apart_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    name = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    save_file({**compvis(True), name: torch.ones(shape)}, tmp_path / "a")

    with pytest.raises(CheckpointError, match="shape"):
        convert(tmp_path / "a", tmp_path / "b", **told(True))


@pytest.mark.parametrize("levels", [0, 7, 1000])
@pytest.mark.parametrize("image_size", [None, 8])
def test_a_vae_of_no_or_countless_levels_is_refused(
    levels: int, image_size: int | None, first_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    down = "first_stage_model.encoder.down."
    tensors = without(down, first_tensors)
    tensors |= {f"{down}{level}.block.0.conv2.weight": torch.ones(1) for level in range(levels)}
    save_file(tensors, tmp_path / "a")

    with pytest.raises(CheckpointError, match=f"has {levels} levels"):
        convert(tmp_path / "a", tmp_path / "b", image_size=image_size)


def test_what_is_stated_must_agree_with_the_file(first_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(first_tensors, tmp_path / "a")

    with pytest.raises(ManifestError, match="family was stated"):
        convert(tmp_path / "a", tmp_path / "b", family="glow")
    with pytest.raises(CheckpointError, match="prediction_type is epsilon or v_prediction"):
        convert(tmp_path / "a", tmp_path / "b", prediction_type="flow")
    with pytest.raises(CheckpointError, match="multiple of 2"):
        convert(tmp_path / "a", tmp_path / "b", image_size=7)


def test_a_pickled_single_file_is_refused_with_what_to_do(first_tensors: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": first_tensors}, tmp_path / "a.ckpt")

    with pytest.raises(CheckpointError, match="safetensors alone"):
        convert(tmp_path / "a.ckpt", tmp_path / "b")


def test_the_vocabulary_gives_the_ids_that_clip_was_trained_with(
    first_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(first_tensors, tmp_path / "a")
    model = load_single_file(tmp_path / "a", image_size=8)

    row = model.tokens(["a photo of a cat"])[0].tolist()

    assert row == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]  # as published with CLIP


@pytest.mark.parametrize(
    ("name", "side", "text"),
    [("sd1", 512, 123_060_480), ("sd2-epsilon", 512, 340_387_840), ("sd2-v", 768, 340_387_840)],
)
def test_the_shipped_configurations_are_of_the_published_sizes(name: str, side: int, text: int) -> None:
    configs = json.loads((CONFIGS / f"{name}.json").read_text())
    configs["tokenizer"] |= {"vocab_bytes": 1, "merges_bytes": 1}
    with torch.device("meta"):
        model = StableDiffusion((3, side, side), 8, **configs)

    sizes = [sum(one.numel() for one in part.parameters()) for part in (model.unet, model.vae, model.text_encoder)]

    assert sizes == [859_520_964 if name == "sd1" else 865_910_724, 83_653_863, text]
