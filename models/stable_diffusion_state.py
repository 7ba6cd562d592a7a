"""From foreign parts to our Stable Diffusion: what the readers of folders and of single files share.

Tensors move from their file into the model one by one, so that no more than the float32 weights is held at once.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from models.checkpoints import check_shapes
from models.errors import CheckpointFormatError, NonFiniteError, TensorMismatchError
from models.prompt_tokens import MAX_FILE_BYTES
from models.stable_diffusion import StableDiffusion
from models.stable_diffusion_parts import scale_of
from models.tensor_files import Extent, quoted, read_header, read_tensors

__all__ = ["MAX_CONFIG_BYTES", "assembled", "read_json", "renamed"]

MAX_CONFIG_BYTES = 2**20
Rename = Callable[[str], str | None]
"""Our name of a tensor by its name in a file; None leaves it out."""
Reshape = Callable[[str, Tensor], Tensor]
"""A tensor as our model holds it, by our name."""


def read_json(file: Extent, name: str, most: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointFormatError: it is none, or too large.
    """
    if file.size > most:
        raise CheckpointFormatError(f"{name} has {file.size:,} bytes; the most is {most:,}")
    try:
        found = json.loads(file.read())
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{name} is no JSON") from error
    if not isinstance(found, dict):
        raise CheckpointFormatError(f"{name} holds no JSON object")
    return found


def renamed(
    files: Mapping[str, Extent], rename: Rename, reshape: Reshape = lambda _, value: value
) -> dict[str, Tensor]:
    """The tensors of some files under our names, float32; numbers of lower precision keep their values.

    Raises:
        TensorMismatchError: two have one name, or one holds whole numbers.
        NonFiniteError: one holds NaN or infinity.
    """
    tensors: dict[str, Tensor] = {}
    for file in files.values():
        header = read_header(file)
        ours = {name: new for name in header.tensors if (new := rename(name)) is not None}
        for name, new in ours.items():
            if new in tensors:
                raise TensorMismatchError(f"tensor {quoted(new)} stands twice in the files; save the weights once")
            tensors[new] = reshape(new, _in_float32(name, read_tensors(file, {name}, header)[name]))
    return tensors


def assembled(
    configs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    files: tuple[bytes, bytes],
    special: Mapping[str, str],
) -> StableDiffusion:
    """Our model of checked configurations, weights and a tokenizer.

    Args:
        configs: "unet", "vae", "text_encoder" and "scheduler"; see `StableDiffusion`.
        weights: float32, by our names ("unet.conv_in.weight"); they become the model's own memory.
        files: vocab.json and merges.txt of the tokenizer.
        special: its special tokens.

    Raises:
        ArchitectureError: the configurations do not make one model.
        TensorMismatchError: a tensor is missing, odd or of another shape.
    """
    vocab, merges = files
    for name, file in (("vocab.json", vocab), ("merges.txt", merges)):
        if not 0 < len(file) <= MAX_FILE_BYTES:
            raise CheckpointFormatError(f"the tokenizer's {name} has {len(file):,} bytes, not 1 to {MAX_FILE_BYTES:,}")
    side = int(configs["unet"]["sample_size"]) * scale_of(configs["vae"])
    tokenizer = {"vocab_bytes": len(vocab), "merges_bytes": len(merges), **special}
    with torch.device("meta"):
        model = StableDiffusion((configs["vae"]["in_channels"], side, side), **configs, tokenizer=tokenizer)
    state = dict(weights)
    for name, file in (("tokenizer.vocab", vocab), ("tokenizer.merges", merges)):
        state[name] = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    found = {name: (value.dtype, tuple(value.shape)) for name, value in state.items()}
    check_shapes(found, {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()})
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True).eval()


def _in_float32(name: str, value: Tensor) -> Tensor:
    """A weight as the model holds it."""
    if not value.is_floating_point():
        raise TensorMismatchError(f"{quoted(name)} is {value.dtype}, no weight; save the weights as floats")
    value = value.to(torch.float32)
    if not bool(torch.isfinite(value).all()):
        raise NonFiniteError(f"{quoted(name)} holds NaN or infinity; use an earlier checkpoint")
    return value
