"""The one-shot converter: foreign weights in, a checkpoint with a manifest out; the only reader of foreign formats.

It runs in a process without network, credentials or much memory, because its input is hostile until proven otherwise.
Code in a pickle is refused, never run: `torch.load` is called with `weights_only=True`, on archives checked beforehand.
"""

import pickle  # noqa: TID251 - only for the name of the error that torch.load raises
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoints import (
    METADATA_KEY,
    Manifest,
    build,
    check_shapes,
    load_checkpoint,
    load_tensors,
    read_header,
    read_manifest,
    save_checkpoint,
)
from models.errors import (
    CheckpointError,
    CheckpointFormatError,
    ManifestError,
    MissingFactError,
    NonFiniteError,
    TensorMismatchError,
    UnknownFamilyError,
    UnsafeCheckpointError,
)
from models.families import FAMILIES

MAX_PICKLE_BYTES = 64 * 2**20
"""Most bytes of the index inside a torch archive; the tensors lie beside it."""
MAX_ENTRIES = 100_000
DERIVED = re.compile(r"\.invconv\.(u_mask|l_mask|l_eye)$")
"""Constants of the published layout that the architecture implies."""


def convert(
    source: Path | str,
    destination: Path | str,
    *,
    image_size: int | None = None,
    n_bits: int | None = None,
    family: str | None = None,
) -> Manifest:
    """Convert a checkpoint of any accepted kind to ours.

    Accepted: our own files (verified and copied), and plain state dicts of the Flow Taming authors' Glow layout as
    safetensors or as a torch archive. Everything that shapes tell is inferred.

    Args:
        source: the file as uploaded.
        destination: where the checkpoint goes.
        image_size: side of the square image in pixels; no file of the foreign layout tells it.
        n_bits: colour depth a channel; likewise.
        family: model family, where the caller knows it; otherwise told from the names.

    Returns:
        The manifest of the checkpoint written.

    Raises:
        CheckpointError: a leaf of that tree says what is wrong and what to do.
    """
    tensors: dict[str, Tensor]
    if _is_safetensors(source):
        if METADATA_KEY in read_header(source).metadata:
            return _copy_through(source, destination, image_size, n_bits, family)
        tensors = load_tensors(source)
    else:
        tensors = _read_torch_archive(source)
    family = family or "glow"
    if family not in FAMILIES:
        raise UnknownFamilyError(f"family {family!r} is unknown; known: {', '.join(sorted(FAMILIES))}")
    missing = [name for name, value in (("image_size", image_size), ("n_bits", n_bits)) if value is None]
    if image_size is None or n_bits is None:
        raise MissingFactError(f"the file does not tell {' and '.join(missing)}; state it and send the file again")
    model = glow_from_state_dict(tensors, image_size=image_size, n_bits=n_bits)
    return save_checkpoint(destination, model, extra={"converted_from": "state dict"})


def glow_from_state_dict(tensors: Mapping[str, Tensor], *, image_size: int, n_bits: int) -> nn.Module:
    """Build our Glow from a state dict of the published layout; shapes tell everything but image size and n_bits."""
    state = {name.removeprefix("module."): value for name, value in tensors.items()}
    if len(state) != len(tensors):
        raise TensorMismatchError("some names stand both with and without 'module.'; save one state dict")
    blocks = _count(state, re.compile(r"^blocks\.(\d+)\."))
    steps = _count(state, re.compile(r"^blocks\.\d+\.flows\.(\d+)\."))
    if not blocks or not steps:
        shown = ", ".join(sorted(state)[:3]) or "none"
        raise TensorMismatchError(f"these are no Glow weights (no blocks.B.flows.F names; found {shown})")
    first = "blocks.0.flows.0."
    hidden = _shape(state, first + "coupling.net.0.weight", 4)[0]
    squeezed = _shape(state, first + "actnorm.loc", 4)[1]
    outputs = _shape(state, first + "coupling.net.4.conv.weight", 4)[0]
    if squeezed % 4 or outputs not in (squeezed, squeezed // 2):
        raise TensorMismatchError(f"{first}actnorm has {squeezed} channels and its coupling {outputs}: no Glow")
    manifest = Manifest(
        family="glow", image_size=image_size, channels=squeezed // 4, n_bits=n_bits, tensor_digest="",
        architecture={
            "n_block": blocks, "n_flow": steps, "hidden": hidden, "affine": outputs == squeezed,
            "lu": [f"blocks.{b}.flows.0.invconv.w_l" in state for b in range(blocks)],
        },
    )  # fmt: skip
    model = build(manifest)
    expected = {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if DERIVED.search(name):
            continue
        if name.endswith(".actnorm.initialized"):
            value = torch.ones((), dtype=torch.uint8)  # trained weights: whatever the flag says, they are initialised
        elif name in expected and value.is_floating_point():
            value = value.to(expected[name][0])
        plain[name] = value.detach().clone().contiguous()
    for name in expected:
        if name.endswith(".actnorm.initialized"):
            plain.setdefault(name, torch.ones((), dtype=torch.uint8))
    check_shapes({name: (value.dtype, tuple(value.shape)) for name, value in plain.items()}, expected)
    for name, value in plain.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; use an earlier checkpoint")
    model.load_state_dict(plain, assign=True)
    return model.requires_grad_(True).eval()


def _copy_through(
    source: Path | str, destination: Path | str, image_size: int | None, n_bits: int | None, family: str | None
) -> Manifest:
    """Verify one of our own files and copy it; what the caller states must agree with its manifest."""
    manifest = read_manifest(source)
    stated = {"image_size": image_size, "n_bits": n_bits, "family": family}
    for name, value in stated.items():
        if value is not None and value != getattr(manifest, name):
            raise ManifestError(f"{name} was stated as {value!r}; the file's manifest says {getattr(manifest, name)!r}")
    load_checkpoint(source)
    shutil.copyfile(source, destination)
    return manifest


def _is_safetensors(source: Path | str) -> bool:
    """Whether the file's ninth byte opens a JSON object, as that format alone has it."""
    if Path(source).stat().st_size == 0:
        raise CheckpointFormatError("the file is empty; upload it again")
    with Path(source).open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and not head.startswith(b"PK")


def _read_torch_archive(source: Path | str) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d state dict, with nothing in it executed."""
    _check_archive(Path(source))
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)  # noqa: TID251 - the converter's one door
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            "the file holds more than tensors (Python objects or code); nothing in it was run: "
            "save model.state_dict(), or write safetensors"
        ) from error
    except Exception as error:  # a damaged archive surfaces as RuntimeError, EOFError, KeyError, ...
        raise CheckpointFormatError(f"the file is damaged or no checkpoint ({type(error).__name__})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointFormatError("the file holds no state dict; save model.state_dict()")
    budget = Path(source).stat().st_size
    tensors: dict[str, Tensor] = {}
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointFormatError(f"entry {str(name)[:80]!r} is no tensor; save model.state_dict() alone")
        if value.layout != torch.strided or value.is_quantized:
            raise CheckpointFormatError(f"tensor {name[:80]!r} is sparse or quantised; save it dense")
        budget -= value.numel() * value.element_size()
        if budget < 0:
            raise UnsafeCheckpointError(
                "the tensors claim more bytes than the file has; nothing was allocated for them"
            )
        tensors[name] = value
    return tensors


def _check_archive(path: Path) -> None:
    """Refuse archives that inflate, and files that are no torch archive at all."""
    with path.open("rb") as file:
        magic = file.read(2)
    if magic != b"PK":
        raise CheckpointFormatError("the file is neither safetensors nor a torch archive; was the upload cut short?")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception as error:  # zipfile raises BadZipFile, and others on hostile directories
        raise CheckpointFormatError("the torch archive is damaged or cut short") from error
    if len(entries) > MAX_ENTRIES:
        raise UnsafeCheckpointError(f"the archive has {len(entries):,} entries; the most is {MAX_ENTRIES:,}")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UnsafeCheckpointError("the archive is compressed, which torch.save never does; it was not unpacked")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UnsafeCheckpointError("the archive claims more bytes than the file has; it was not unpacked")
    for entry in entries:
        if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise UnsafeCheckpointError(f"the archive's index has {entry.file_size:,} bytes; it was not read")


def _count(state: Mapping[str, Tensor], pattern: re.Pattern[str]) -> int:
    """One more than the highest index that the pattern finds, capped so that a name cannot make us allocate."""
    found = [int(match.group(1)[:6]) for name in state if (match := pattern.match(name))]
    highest = max(found, default=-1) + 1
    if highest > len(state):
        raise TensorMismatchError(f"index {highest - 1} is named but only {len(state)} tensors are there")
    return highest


def _shape(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in state:
        raise TensorMismatchError(f"{name} is missing; save the whole state dict")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions:
        raise TensorMismatchError(f"{name} has shape {list(shape)}; it needs {dimensions} dimensions")
    return shape


__all__ = ["CheckpointError", "convert", "glow_from_state_dict"]
