"""The layout in which diffusers saves a `UNet2DModel` of classes, and what tells it apart."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from models.checkpoints import Manifest
from models.errors import ArchitectureError, MissingFactError, TensorMismatchError
from models.state_dicts import count, filled, shape_of, without_prefix

N_BITS = 8
NORM_GROUPS, HEAD_WIDTH = 32, 8
"""What `UNet2DModel` has where nobody says otherwise; no tensor's shape tells them."""
STEPS, GUIDANCE = 50, 2.0
"""Of the sampler, to begin with; every job can state others."""
ASSUMED: dict[str, Any] = {
    "norm_groups": NORM_GROUPS, "head_width": HEAD_WIDTH, "beta_schedule": "linear", "timesteps": 1000,
    "null_class": "the last row of class_embedding",
}  # fmt: skip
"""Stands in the manifest of what is converted."""
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Of the layers of an attention, as diffusers called them before."""
SELF = "unet."


def is_ddpm(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of that U-Net, and of none that reads prompts."""
    names = {name.removeprefix("module.") for name in tensors}
    known = {"conv_in.weight", "time_embedding.linear_1.weight", "conv_norm_out.weight"} <= names
    return known and not any(".transformer_blocks." in name for name in names)


def ddpm_from_state_dict(
    tensors: Mapping[str, Tensor],
    *,
    image_size: int | None = None,
    n_bits: int | None = None,
    prediction_type: str | None = None,
) -> nn.Module:
    """Build our DDPM from a state dict of that layout.

    Shapes tell the network. Taken for granted is what `ASSUMED` says beside the other defaults of `UNet2DModel`.

    Args:
        tensors: the state dict.
        image_size: side of the square image, in pixels.
        n_bits: colour depth; 8 where it is not stated.
        prediction_type: what the network answers; "epsilon" where it is not stated.

    Raises:
        MissingFactError: image_size is not stated.
        TensorMismatchError: the tensors do not make one such network, or it has no classes.
        ArchitectureError: a width says that the network was built with other group norms than assumed.
    """
    state = {_renamed(name): value for name, value in without_prefix(tensors).items()}
    if image_size is None:
        raise MissingFactError("the file does not tell image_size; state it and send the file again")
    if "class_embedding.weight" not in state:
        raise TensorMismatchError(
            "the U-Net knows no classes (no class_embedding.weight), so none can be forgotten; train one with "
            "num_class_embeds = classes + 1, the last of which stands for no class, and drop labels to it in training"
        )
    rows = shape_of(state, "class_embedding.weight", 2)[0]
    if rows < 2:
        raise TensorMismatchError(
            "class_embedding has one row; it takes one for each class, and a last one for no class, on which guidance "
            "relies"
        )
    levels = count(state, re.compile(r"^down_blocks\.(\d+)\."))
    widths = [shape_of(state, f"down_blocks.{level}.resnets.0.conv1.weight", 4)[0] for level in range(levels)]
    if not widths:
        raise TensorMismatchError("down_blocks are missing; save the whole state dict")
    odd = [width for width in widths if width % NORM_GROUPS]
    if odd:
        raise ArchitectureError(
            f"a level is {odd[0]} wide, which {NORM_GROUPS} groups do not divide; the file does not tell its "
            "norm_groups: put the weights into models.ddpm.ClassDDPM with yours, and send what save_checkpoint writes"
        )
    embedded = shape_of(state, "mid_block.resnets.0.time_emb_proj.weight", 2)[0]
    manifest = Manifest(
        family="ddpm", image_size=image_size, channels=shape_of(state, "conv_in.weight", 4)[1],
        n_bits=N_BITS if n_bits is None else n_bits, tensor_digest="",
        architecture={
            "channels": widths,
            "layers": count(state, re.compile(r"^down_blocks\.0\.resnets\.(\d+)\.")),
            "attention": [f"down_blocks.{level}.attentions.0.to_q.weight" in state for level in range(levels)],
            "middle_attention": "mid_block.attentions.0.to_q.weight" in state,
            "norm_groups": NORM_GROUPS, "head_width": HEAD_WIDTH, "scale_shift": embedded == 2 * widths[-1],
            "n_classes": rows - 1,
            "scheduler": {} if prediction_type is None else {"prediction_type": prediction_type},
            "sampling": {"steps": STEPS, "guidance_scale": GUIDANCE},
        },
    )  # fmt: skip
    return filled(manifest, {f"{SELF}{name}": value for name, value in state.items()})


def _renamed(name: str) -> str:
    """The name that a layer of an attention has today."""
    owner, _, rest = name.rpartition(".attentions.")
    parts = rest.split(".")
    if not owner or len(parts) != 3 or parts[1] not in OLD_NAMES:
        return name
    return f"{owner}.attentions.{parts[0]}.{OLD_NAMES[parts[1]]}.{parts[2]}"
