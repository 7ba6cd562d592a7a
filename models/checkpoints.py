"""The checkpoint format: one safetensors file that carries its own manifest, checked before and after it is loaded.

The manifest is JSON under the key `forgetd` of the safetensors metadata. Its families: `models.families`.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.conditional import CheckpointedConditional
from models.errors import (
    ArchitectureError,
    DigestError,
    ManifestError,
    NonFiniteError,
    TensorMismatchError,
    UnknownFamilyError,
    WrongKindError,
)
from models.families import CONDITIONALS, FAMILIES, FLOWS
from models.protocol import Checkpointed, CheckpointedFlow
from models.tensor_files import DTYPES, Header, quoted, read_header, read_tensors

SCHEMA_VERSION = 1
METADATA_KEY = "forgetd"
MAX_MANIFEST_CHARACTERS = 64 * 2**10
MAX_MANIFEST_LEVELS = 32
ODD_CHARACTERS = re.compile("[\\0\ud800-\udfff]")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, beside its tensors."""

    family: str
    architecture: dict[str, Any]
    image_size: int
    """Side of the square image, in pixels."""
    channels: int
    n_bits: int
    """Colour depth a channel that the model was trained at."""
    tensor_digest: str
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, in the order of their names, as hex."""
    schema_version: int = SCHEMA_VERSION
    extra: dict[str, Any] = field(default_factory=dict)
    """Free JSON of the writer: where the weights come from."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.channels, self.image_size, self.image_size

    def to_json(self) -> str:
        """The text that stands in the file."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read and check the text of a manifest.

        Raises:
            ManifestError: it is too long or no JSON object, or a field is missing, odd or of the wrong type.
        """
        if len(text) > MAX_MANIFEST_CHARACTERS:
            raise ManifestError(f"the manifest has {len(text):,} characters; the most is {MAX_MANIFEST_CHARACTERS:,}")
        try:
            fields = json.loads(text, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ManifestError("the manifest is no JSON; convert the checkpoint again") from error
        types = {
            "family": str, "architecture": dict, "image_size": int, "channels": int, "n_bits": int,
            "tensor_digest": str, "schema_version": int, "extra": dict,
        }  # fmt: skip
        if not isinstance(fields, dict):
            raise ManifestError("the manifest is no JSON object; convert the checkpoint again")
        _check_plain(fields)
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"manifest schema version {quoted(version)} is not known here (this is {SCHEMA_VERSION})"
            )
        _check_fields(fields, types, "manifest")
        return cls(**fields)


def save_checkpoint(path: Path | str, model: nn.Module, extra: Mapping[str, Any] | None = None) -> Manifest:
    """Write a model and its manifest as one file, whole or not at all.

    Args:
        path: where; an existing file is replaced.
        model: a model of a known family, on any device.
        extra: JSON facts to keep beside it, such as the training recipe.

    Returns:
        The manifest written.
    """
    if not isinstance(model, Checkpointed) or model.family not in FAMILIES:
        raise UnknownFamilyError(f"{type(model).__name__} is of no known family ({', '.join(sorted(FAMILIES))})")
    if len(model.image_shape) != 3:
        raise ArchitectureError(f"checkpoints hold images (c, h, w), not values of shape {tuple(model.image_shape)}")
    channels, height, width = model.image_shape
    if height != width:
        raise ArchitectureError(f"checkpoints hold square images, not {height} x {width}")
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    _check_finite(tensors)
    manifest = Manifest(
        family=model.family, architecture=dict(model.architecture), image_size=height, channels=channels,
        n_bits=model.n_bits, tensor_digest=tensor_digest(tensors), extra=dict(extra or {}),
    )  # fmt: skip
    text = manifest.to_json()
    Manifest.from_json(text)  # what could not be read again is not written
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata={METADATA_KEY: text})
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return manifest


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Load a checkpoint, in evaluation mode; every claim of its manifest is verified.

    The result is also a `models.protocol.Checkpointed`; `load_flow` and `load_conditional` have the narrower types.

    Raises:
        CheckpointError: a leaf of that tree says what is wrong and what to do.
    """
    manifest = read_manifest(path)
    header = read_header(path)
    model = build(manifest)
    _check_names(header, model)
    tensors = read_tensors(path)
    _check_finite(tensors)
    if tensor_digest(tensors) != manifest.tensor_digest:
        raise DigestError("the tensors are not those of the manifest: the file was altered; convert or upload it again")
    model.load_state_dict({**later_state(model), **tensors}, assign=True)
    return model.requires_grad_(True).to(device).eval()


def load_flow(path: Path | str, device: torch.device | str = "cpu") -> CheckpointedFlow:
    """`load_checkpoint`, typed as the flow it is.

    Raises:
        WrongKindError: the model is no flow.
    """
    _check_kind(path, FLOWS, "a flow, which has exact likelihoods")
    return cast(CheckpointedFlow, load_checkpoint(path, device))


def load_conditional(path: Path | str, device: torch.device | str = "cpu") -> CheckpointedConditional:
    """`load_checkpoint`, typed as the conditional model it is.

    Raises:
        WrongKindError: the model is none.
    """
    _check_kind(path, CONDITIONALS, "a conditional model")
    return cast(CheckpointedConditional, load_checkpoint(path, device))


def _check_kind(path: Path | str, kind: Mapping[str, object], needed: str) -> None:
    family = read_manifest(path).family
    if family in FAMILIES and family not in kind:
        raise WrongKindError(
            f"the checkpoint holds a model of family {family!r}; what was asked for works on {needed}: "
            f"{', '.join(sorted(kind))}"
        )


def read_manifest(path: Path | str) -> Manifest:
    """Read only the header of a checkpoint.

    Raises:
        ManifestError: the file is a safetensors file without our manifest.
    """
    text = read_header(path).metadata.get(METADATA_KEY)
    if text is None:
        raise ManifestError("the file has no manifest; convert it first, stating image size and n_bits")
    return Manifest.from_json(text)


def build(manifest: Manifest) -> nn.Module:
    """An empty model of the manifest's architecture, on the meta device: it costs no memory."""
    family = FAMILIES.get(manifest.family)
    if family is None:
        raise UnknownFamilyError(f"family {quoted(manifest.family)} is unknown; known: {', '.join(sorted(FAMILIES))}")
    _check_fields(manifest.architecture, family.architecture, "architecture")
    with torch.device("meta"):
        return cast(nn.Module, family.build(manifest.image_shape, manifest.n_bits, manifest.architecture))


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names, as hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_fields(values: Mapping[str, Any], types: Mapping[str, type], what: str) -> None:
    missing, odd = sorted(types.keys() - values.keys()), sorted(values.keys() - types.keys())
    if missing or odd:
        raise ManifestError(
            f"the {what} lacks {quoted(missing)} and has unknown {quoted(odd)}; convert the checkpoint again"
        )
    for name, kind in types.items():
        if type(values[name]) is not kind:
            raise ManifestError(f"the {what}'s {name} must be {kind.__name__}, not {quoted(values[name])}")


def _check_plain(fields: dict[str, Any]) -> None:
    """Nothing that a database or another reader of JSON would refuse: NUL, half a surrogate pair, infinity, depth."""
    waiting: list[tuple[object, int]] = [(fields, 1)]
    while waiting:
        value, level = waiting.pop()
        if level > MAX_MANIFEST_LEVELS:
            raise ManifestError(f"the manifest is nested more than {MAX_MANIFEST_LEVELS} levels deep")
        if isinstance(value, dict):
            waiting += [(part, level + 1) for entry in value.items() for part in entry]
        elif isinstance(value, list):
            waiting += [(part, level + 1) for part in value]
        elif isinstance(value, str) and ODD_CHARACTERS.search(value):
            raise ManifestError("the manifest holds a NUL or half of a surrogate pair; convert the checkpoint again")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ManifestError("the manifest holds a number that is not finite; convert the checkpoint again")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def later_state(model: nn.Module) -> dict[str, Tensor]:
    """What a model's tensors hold that older files lack: its own `later_state()`; none where it has no such method."""
    own = getattr(model, "later_state", None)
    return own() if callable(own) else {}


def _check_names(header: Header, model: nn.Module) -> None:
    expected = {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}
    found = {name: expected[name] for name in later_state(model)}
    found.update({name: (DTYPES[dtype], shape) for name, (dtype, shape) in header.tensors.items()})
    check_shapes(found, expected)


def check_shapes(
    found: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> None:
    """Compare names, dtypes and shapes with those of the architecture.

    Raises:
        TensorMismatchError: names the first differences and counts the rest.
    """
    missing, odd = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise TensorMismatchError(f"{len(missing)} tensors are missing: {_some(missing)}; save the whole state dict")
    if odd:
        raise TensorMismatchError(f"{len(odd)} tensors do not belong to the model: {_some(odd)}; remove them")
    for name, (dtype, shape) in expected.items():
        if found[name][1] != shape:
            raise TensorMismatchError(f"{name} has shape {list(found[name][1])}; the architecture needs {list(shape)}")
        if found[name][0] != dtype:
            raise TensorMismatchError(f"{name} is {found[name][0]}; the model holds {dtype}; save it as that")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    bad = [name for name in sorted(tensors) if not bool(torch.isfinite(tensors[name]).all())]
    if bad:
        raise NonFiniteError(f"{len(bad)} tensors hold NaN or infinity: {_some(bad)}; use an earlier checkpoint")


def _some(names: list[str]) -> str:
    shown = ", ".join(re.sub(r"[^\w.\-]", "?", name)[:80] for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
