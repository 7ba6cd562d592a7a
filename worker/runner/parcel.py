"""Values for another process of the same job, in one safetensors file: records, tensors, and what JSON holds.

Nothing is unpickled, and only records of known types are made again. Tensors are mapped, not copied: several processes
that read a parcel share its pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["pack", "unpack"]

METADATA_KEY = "forgetd_parcel"


def pack(value: object, path: Path) -> None:
    """Write records (dataclasses), mappings by name, tuples, tensors, and what JSON holds.

    Raises:
        TypeError: something is neither.
    """
    tensors: dict[str, Tensor] = {}
    save_file(tensors, path, metadata={METADATA_KEY: json.dumps(_described(value, tensors))})


def unpack(path: Path, records: Sequence[type]) -> Any:
    """What was packed.

    Args:
        path: of the file.
        records: the types that it may hold.

    Raises:
        KeyError: it holds another.
    """
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()[METADATA_KEY])
        return _made(described, file, {one.__name__: one for one in records})


def _described(value: object, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON: a record, a container or a tensor as an object of one member, which says what it is."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()  # one file holds no tensors that share memory
        return {"tensor": name}
    if is_dataclass(value) and not isinstance(value, type):
        own = {one.name: _described(getattr(value, one.name), tensors) for one in fields(value)}
        return {"record": [type(value).__name__, own]}
    if isinstance(value, Mapping):
        return {"mapping": {str(name): _described(one, tensors) for name, one in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_described(one, tensors) for one in value]}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be packed")


def _made(told: Any, file: Any, records: Mapping[str, type]) -> Any:
    if not isinstance(told, dict):
        return told
    ((kind, held),) = told.items()
    if kind == "tensor":
        return file.get_tensor(held)
    if kind == "record":
        name, own = held
        return records[name](**{field: _made(one, file, records) for field, one in own.items()})
    if kind == "mapping":
        return {name: _made(one, file, records) for name, one in held.items()}
    items = [_made(one, file, records) for one in held]
    return tuple(items) if kind == "tuple" else items
