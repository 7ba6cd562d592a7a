"""From foreign parts to our latent diffusion models: what the readers of folders and of single files share.

Tensors move from their file into the model one by one, so that no more than the float32 weights is held at once.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.checkpoints import check_shapes
from models.errors import CheckpointFormatError, NonFiniteError, TensorMismatchError
from models.latent_diffusion import LatentDiffusion
from models.prompt_tokens import MAX_FILE_BYTES
from models.stable_diffusion_parts import scale_of
from models.tensor_files import Extent, quoted, read_header, read_tensors

__all__ = ["MAX_CONFIG_BYTES", "TokenizerFiles", "assembled", "read_json", "renamed"]

M = TypeVar("M", bound=LatentDiffusion)

MAX_CONFIG_BYTES = 2**20
Rename = Callable[[str], str | None]
"""Our name of a tensor by its name in a file; None leaves it out."""
Reshape = Callable[[str, Tensor], Tensor]
"""A tensor as our model holds it, by our name."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What a tokenizer is read from."""

    vocab: bytes
    """vocab.json."""
    merges: bytes
    """merges.txt."""
    special: Mapping[str, str]
    """Its special tokens."""


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
    kind: type[M],
    configs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizers: Mapping[str, TokenizerFiles],
) -> M:
    """Our model of checked configurations, weights and tokenizers.

    Args:
        kind: its class.
        configs: "unet", "vae", "scheduler" and what else its constructor takes, but for the tokenizers.
        weights: float32, by our names ("unet.conv_in.weight"); they become the model's own memory.
        tokenizers: by submodule.

    Raises:
        ArchitectureError: the configurations do not make one model.
        TensorMismatchError: a tensor is missing, odd or of another shape.
    """
    state = dict(weights)
    for name, files in tokenizers.items():
        for part, file in (("vocab.json", files.vocab), ("merges.txt", files.merges)):
            if not 0 < len(file) <= MAX_FILE_BYTES:
                raise CheckpointFormatError(f"the {name}'s {part} has {len(file):,} bytes, not 1 to {MAX_FILE_BYTES:,}")
            state[f"{name}.{part.partition('.')[0]}"] = torch.frombuffer(bytearray(file), dtype=torch.uint8)
    read = {
        name: {"vocab_bytes": len(files.vocab), "merges_bytes": len(files.merges), **files.special}
        for name, files in tokenizers.items()
    }
    side = int(configs["unet"]["sample_size"]) * scale_of(configs["vae"])
    build: Callable[..., M] = kind  # whose arguments are those of its family
    with torch.device("meta"):
        model = build((configs["vae"]["in_channels"], side, side), **configs, **read)
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
