"""The Fisher information of a checkpoint as one file: computed once, read by every later request on that checkpoint."""

import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from unlearning.errors import FisherError, ParameterError
from unlearning.fisher_result import Fisher, check_weights

METADATA_KEY = "forgetd_fisher"
SCHEMA_VERSION = 1
STORED = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""Precisions of a file. Entries span ten decades: float16 would turn many to zero."""

KINDS: dict[str, type] = {
    "rows": list, "draws": int, "plan": str, "reduction": str, "seed": int, "precision": str, "estimator": str,
    "weights": str, "replay": str, "shapes": dict, "versions": dict,
}  # fmt: skip
"""What a manifest holds at least, by name."""


def save_fisher(fisher: Fisher, path: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write tensors and manifest as one safetensors file, whole or not at all.

    Args:
        fisher: what to store.
        path: of the file.
        dtype: float32, or bfloat16: half the size, each entry to 0.4 %.

    Raises:
        ParameterError: another dtype.
    """
    if dtype not in STORED:
        raise ParameterError("dtype", f"is float32 or bfloat16, not {dtype}: F spans more decades than others hold")
    target = Path(path)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in fisher.tensors.items()}
    try:
        save_file(tensors, part, metadata={METADATA_KEY: json.dumps(manifest(fisher, dtype), sort_keys=True)})
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def manifest(fisher: Fisher, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What stands beside the tensors: all facts of `Fisher`, the shapes, the stored dtype and versions, as JSON."""
    facts = {name: getattr(fisher, name) for name in _facts()}
    shapes = {name: list(value.shape) for name, value in fisher.tensors.items()}
    versions = {"torch": torch.__version__, "schema": SCHEMA_VERSION}
    return {
        **facts, "rows": [list(row) for row in fisher.rows], "examples": fisher.examples, "shapes": shapes,
        "dtype": STORED[dtype], "versions": versions,
    }  # fmt: skip


def load_fisher(path: Path | str, *, weights: str, names: Sequence[str]) -> Fisher:
    """Read the Fisher information of these weights, for these parameters.

    Args:
        path: of a file of `save_fisher`.
        weights: `tensor_digest` of the model's state dict.
        names: the parameters wanted; a file of a wider scope serves, and only these tensors are read.

    Raises:
        FisherError: the file is damaged or none, of other weights, or lacks a name.
    """
    try:
        with safe_open(path, framework="pt") as file:
            facts = _read_manifest((file.metadata() or {}).get(METADATA_KEY))
            check_weights(facts["weights"], weights)
            missing = [name for name in names if name not in facts["shapes"]]
            if missing:
                raise FisherError(f"the Fisher information has no {', '.join(missing[:3])}: compute it for this scope")
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise FisherError(f"the Fisher information cannot be read: {error}") from error
    for name, value in tensors.items():
        if list(value.shape) != facts["shapes"][name] or value.dtype not in STORED:
            raise FisherError(f"{name} is {value.dtype} {tuple(value.shape)}, not what its manifest says")
    known = {name: facts[name] for name in _facts()}
    try:
        known["rows"] = tuple((int(start), int(stop)) for start, stop in facts["rows"])
    except (TypeError, ValueError) as error:
        raise FisherError(f"the manifest is damaged: rows are {facts['rows']!r}"[:200]) from error
    return Fisher(tensors={name: value.float() for name, value in tensors.items()}, **known)


def _facts() -> list[str]:
    return [one.name for one in fields(Fisher) if one.name != "tensors"]


def _read_manifest(text: str | None) -> dict[str, Any]:
    if text is None:
        raise FisherError("the file is no stored Fisher information")
    try:
        facts = json.loads(text)
    except json.JSONDecodeError as error:
        raise FisherError(f"the manifest is no JSON: {error}") from error
    for name, kind in KINDS.items():
        if not isinstance(facts, dict) or name not in facts:
            raise FisherError(f"the manifest lacks {name!r}")
        if type(facts[name]) is not kind:
            raise FisherError(f"the manifest is damaged: {name} is {facts[name]!r}")
    if (schema := facts["versions"].get("schema")) != SCHEMA_VERSION:
        raise FisherError(f"the file is of schema {schema}, this release reads {SCHEMA_VERSION}")
    return dict(facts)
