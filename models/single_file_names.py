"""The names that CompVis and Stability AI give to the tensors of a single-file Stable Diffusion, as those of diffusers.

The blocks of theirs that follow each other are, in diffusers, levels with layers in them; the rest is called otherwise.
"""

import re
from collections.abc import Iterable

__all__ = ["CLIP", "OPEN_CLIP", "UNET", "VAE", "clip_name", "is_single_file", "open_clip_name", "unet_name", "vae_name"]

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "out_layers.0": "norm2", "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj", "skip_connection": "conv_shortcut",
}  # fmt: skip
UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2", "out.0": "conv_norm_out",
    "input_blocks.0.0": "conv_in", "out.2": "conv_out",
}  # fmt: skip
MIDDLE = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}
VAE_MIDDLE = {
    "block_1": "resnets.0", "block_2": "resnets.1", "attn_1.norm": "attentions.0.group_norm",
    "attn_1.q": "attentions.0.to_q", "attn_1.k": "attentions.0.to_k", "attn_1.v": "attentions.0.to_v",
    "attn_1.proj_out": "attentions.0.to_out.0",
}  # fmt: skip
OPEN_CLIP_ENDS = {
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight", "ln_final.bias": "final_layer_norm.bias",
}  # fmt: skip
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}  # fmt: skip


def is_single_file(names: Iterable[str]) -> bool:
    """Whether the names are those of a latent diffusion model, of this kind or of a later one."""
    return any(name.startswith((UNET, VAE, CLIP, OPEN_CLIP, "conditioner.embedders.")) for name in names)


def unet_name(name: str, layers: int) -> str:
    """The U-Net's, without its prefix; a name that is none is left as it is, to be refused as odd.

    Args:
        name: such as "input_blocks.1.0.in_layers.0.weight".
        layers: residual blocks of a level.
    """
    if found := _swapped(name, UNET_ENDS):
        return found
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        return f"{MIDDLE[match[1]]}.{_swapped(match[2], RESNET) or match[2]}"
    if match := re.fullmatch(r"(input|output)_blocks\.(\d{1,3})\.(\d)\.(.+)", name):
        side, number, place, rest = match[1], int(match[2]), match[3], match[4]
        level, layer = divmod(number - 1 if side == "input" else number, layers + 1)
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        if rest.startswith("op."):
            return f"{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        if place != "0" and rest.startswith("conv."):
            return f"{block}.upsamplers.0.{rest}"
        if place == "1":
            return f"{block}.attentions.{layer}.{rest}"
        return f"{block}.resnets.{layer}.{_swapped(rest, RESNET) or rest}"
    return name


def vae_name(name: str, levels: int) -> str:
    """The VAE's, without its prefix; its decoder counts levels from the image there, and from the latent here."""
    name = name.replace(".nin_shortcut.", ".conv_shortcut.").replace("coder.norm_out.", "coder.conv_norm_out.")
    if match := re.fullmatch(r"(encoder|decoder)\.mid\.(.+)", name):
        return f"{match[1]}.mid_block.{_swapped(match[2], VAE_MIDDLE) or match[2]}"
    if match := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d{1,3})\.(block|downsample|upsample)\.(.+)", name):
        level = int(match[2]) if match[1] == "encoder.down" else levels - 1 - int(match[2])
        kind = {"block": "resnets", "downsample": "downsamplers.0", "upsample": "upsamplers.0"}[match[3]]
        return f"{match[1]}_blocks.{level}.{kind}.{match[4]}"
    return name


def clip_name(name: str) -> str | None:
    """The text encoder's of SD 1.x, without its prefix; None for what diffusers does not have."""
    name = name.removeprefix("text_model.")
    return None if name in ("embeddings.position_ids", "logit_scale", "text_projection.weight") else name


def open_clip_name(name: str, layers: int) -> str | None:
    """The text encoder's of SD 2.x, without its prefix: its last block is not used, and None like what is not text.

    Queries, keys and values are one tensor there, ".self_attn.in_proj.", which the caller has to cut in three.
    """
    if match := re.fullmatch(r"transformer\.resblocks\.(\d{1,3})\.(.+)", name):
        if int(match[1]) >= layers:
            return None
        rest = re.sub(r"^attn\.in_proj_", "self_attn.in_proj.", match[2])
        return f"encoder.layers.{int(match[1])}.{_swapped(rest, OPEN_CLIP_LAYER) or rest}"
    return OPEN_CLIP_ENDS.get(name, None if name in ("text_projection", "logit_scale") else name)


def _swapped(name: str, table: dict[str, str]) -> str | None:
    """The name with its beginning as the table has it."""
    for old, new in table.items():
        if name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None
