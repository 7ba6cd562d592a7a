"""Safetensors as bytes: headers that are not trusted, tensors read into memory of their own, files written as a stream.

A file may stand alone or lie within another, as in a tar: an `Extent` says where. Reading takes no more memory than the
tensors that are asked for, writing none.
"""

import json
import math
import struct
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from models.errors import CheckpointFormatError

__all__ = ["DTYPES", "Extent", "Header", "encoded", "quoted", "read_header", "read_tensors"]

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_QUOTED_CHARACTERS = 80
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Extent:
    """Bytes of a file."""

    path: Path
    start: int
    size: int

    @classmethod
    def whole(cls, path: Path | str) -> "Extent":
        """All of a file."""
        return cls(Path(path), 0, Path(path).stat().st_size)

    def read(self) -> bytes:
        """All of it; fewer bytes where the file was cut short meanwhile."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file whose sizes add up."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    """Name to (dtype, shape)."""
    metadata: dict[str, str]
    starts: dict[str, int] = field(default_factory=dict)
    """Name to the position of its first byte, in the file that holds it all."""


def read_header(source: Path | str | Extent) -> Header:
    """Parse a safetensors header without trusting it: its length is capped, and offsets must tile the file exactly.

    Raises:
        CheckpointFormatError: says what does not add up.
    """
    source = source if isinstance(source, Extent) else Extent.whole(source)
    fields, length = _read_fields(source)
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointFormatError("the safetensors metadata must map text to text")
    if len(fields) > MAX_TENSORS:
        raise CheckpointFormatError(f"the file names {len(fields):,} tensors; the most is {MAX_TENSORS:,}")
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    starts: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in fields.items():
        dtype, shape, span = _read_entry(name, entry)
        tensors[name] = (dtype, shape)
        starts[name] = source.start + 8 + length + span[0]
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointFormatError(f"the safetensors tensors do not lie end to end (byte {end}, then {start})")
        end = stop
    if end != source.size - 8 - length:
        raise CheckpointFormatError(
            f"the header promises {end:,} bytes of tensors, the file has {source.size - 8 - length:,}"
        )
    return Header(tensors, metadata, starts)


def read_tensors(
    source: Path | str | Extent, names: Collection[str] | None = None, header: Header | None = None
) -> dict[str, Tensor]:
    """Tensors of a safetensors file, each in memory of its own, equally aligned.

    Args:
        source: the file.
        names: of those that are wanted; all by default.
        header: the file's, where it was read before.

    Raises:
        CheckpointFormatError: the header does not add up, or the file was cut short since.
    """
    source = source if isinstance(source, Extent) else Extent.whole(source)
    header = read_header(source) if header is None else header
    wanted = header.tensors.keys() if names is None else names
    tensors: dict[str, Tensor] = {}
    with source.path.open("rb") as file:
        for name in sorted(wanted, key=header.starts.__getitem__):
            dtype, shape = header.tensors[name]
            value = torch.empty(shape, dtype=DTYPES[dtype])
            file.seek(header.starts[name])
            if value.numel() and file.readinto(_bytes_of(value)) != value.nbytes:
                raise CheckpointFormatError(f"the file ends within tensor {quoted(name)}; was it cut short?")
            tensors[name] = value
    return tensors


def encoded(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[int, Iterable[bytes | memoryview]]:
    """A safetensors file of these tensors, which may be on any device.

    Returns:
        Its size in bytes, and its parts in order, to be written as they come: no tensor of the CPU's is copied.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(tensors):
        value = tensors[name]
        start, end = end, end + value.nbytes
        fields[name] = {"dtype": CODES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterable[bytes | memoryview]:
        yield struct.pack("<Q", len(text)) + text
        for name in sorted(tensors):
            yield _bytes_of(tensors[name].detach().cpu().contiguous())

    return 8 + len(text) + end, parts()


def quoted(value: object) -> str:
    """A stranger's value for a message, cut short."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."


def _bytes_of(value: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return value.reshape(-1).view(torch.uint8).numpy().data


def _read_fields(source: Extent) -> tuple[dict[str, object], int]:
    """What the header says, and its length in bytes."""
    size = source.size
    if size < 8:
        raise CheckpointFormatError(f"the file has {size} bytes: no safetensors file; was the upload cut short?")
    with source.path.open("rb") as file:
        file.seek(source.start)
        (length,) = struct.unpack("<Q", file.read(8))
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointFormatError("the file is no safetensors file, or was cut short within its header")
        raw = file.read(length)
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError("the safetensors header is no JSON") from error
    if not isinstance(fields, dict):
        raise CheckpointFormatError("the safetensors header is no JSON object")
    return fields, length


def _read_entry(name: str, entry: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(entry, dict):
        raise CheckpointFormatError(f"tensor {quoted(name)} has no description")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointFormatError(f"tensor {quoted(name)} has dtype {quoted(dtype)}; known: {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise CheckpointFormatError(f"tensor {quoted(name)} has a malformed shape or offset")
    shape, offsets = cast(list[int], shape), cast(list[int], offsets)
    if len(offsets) != 2 or len(shape) > 8:
        raise CheckpointFormatError(f"tensor {quoted(name)} has a malformed shape or offset")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise CheckpointFormatError(f"tensor {quoted(name)} does not have the bytes of its shape {shape}")
    return dtype, tuple(shape), (offsets[0], offsets[1])
