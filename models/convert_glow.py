"""The Glow layout in which the Flow Taming authors publish their weights, and what tells it apart."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.checkpoints import Manifest
from models.errors import TensorMismatchError
from models.state_dicts import count, filled, shape_of, without_prefix

DERIVED = re.compile(r"\.invconv\.(u_mask|l_mask|l_eye)$")
"""Constants of the published layout that the architecture implies."""
INITIALIZED = ".actnorm.initialized"


def glow_from_state_dict(tensors: Mapping[str, Tensor], *, image_size: int, n_bits: int) -> nn.Module:
    """Build our Glow from a state dict of the published layout; shapes tell everything but image size and n_bits."""
    state = without_prefix(tensors)
    blocks = count(state, re.compile(r"^blocks\.(\d+)\."))
    steps = count(state, re.compile(r"^blocks\.\d+\.flows\.(\d+)\."))
    if not blocks or not steps:
        shown = ", ".join(sorted(state)[:3]) or "none"
        raise TensorMismatchError(f"these are no Glow weights (no blocks.B.flows.F names; found {shown})")
    first = "blocks.0.flows.0."
    hidden = shape_of(state, first + "coupling.net.0.weight", 4)[0]
    squeezed = shape_of(state, first + "actnorm.loc", 4)[1]
    outputs = shape_of(state, first + "coupling.net.4.conv.weight", 4)[0]
    if squeezed % 4 or outputs not in (squeezed, squeezed // 2):
        raise TensorMismatchError(f"{first}actnorm has {squeezed} channels and its coupling {outputs}: no Glow")
    manifest = Manifest(
        family="glow", image_size=image_size, channels=squeezed // 4, n_bits=n_bits, tensor_digest="",
        architecture={
            "n_block": blocks, "n_flow": steps, "hidden": hidden, "affine": outputs == squeezed,
            "lu": [f"blocks.{b}.flows.0.invconv.w_l" in state for b in range(blocks)],
        },
    )  # fmt: skip
    plain = {name: value for name, value in state.items() if not DERIVED.search(name)}
    for block in range(blocks):
        for step in range(count(state, re.compile(rf"^blocks\.{block}\.flows\.(\d+)\."))):
            # trained weights: whatever the flag says, and where it is missing, they are initialised
            plain[f"blocks.{block}.flows.{step}{INITIALIZED}"] = torch.ones((), dtype=torch.uint8)
    return filled(manifest, plain)
