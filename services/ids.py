"""Identifiers: a type prefix and a UUIDv7, so that they sort by age and say what they name."""

from __future__ import annotations

import re
from typing import Literal, get_args

import uuid_utils

__all__ = ["ID_PATTERNS", "Prefix", "is_id", "new_id"]

Prefix = Literal["ten", "key", "ckpt", "imgs", "clf", "job"]

ID_PATTERNS: dict[Prefix, str] = {prefix: rf"^{prefix}_[0-9a-f]{{32}}$" for prefix in get_args(Prefix)}


def new_id(prefix: Prefix) -> str:
    """A fresh identifier such as ``job_0192...`` (prefix, underscore, 32 hexadecimal digits)."""
    return f"{prefix}_{uuid_utils.uuid7().hex}"


def is_id(prefix: Prefix, text: str) -> bool:
    """Whether the text has the form of an identifier with this prefix; says nothing about existence."""
    return re.fullmatch(ID_PATTERNS[prefix], text) is not None
