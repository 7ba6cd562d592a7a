"""Why a run cannot go on: a problem of the caller's making, too little memory, or a host that fails."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

__all__ = ["OutOfMemory", "UserError", "escaped", "is_out_of_memory", "is_the_hosts"]

# A disk that is full, over its quota, broken or read-only, and a host without a file handle left.
HOST_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE})


class OutOfMemory(Exception):
    """The run does not fit; the next attempt gets a smaller micro-batch."""


class UserError(Exception):
    """The job cannot be done as asked; trying again would not help.

    Args:
        pointer: the place in the request, where there is one; short for ``errors`` with the detail at that place.
    """

    def __init__(self, slug: str, title: str, detail: str, *, pointer: str | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.problem = {"type": f"urn:forgetd:problem:{slug}", "title": title, "detail": detail, **members}
        if pointer is not None:
            self.problem["errors"] = [*members.get("errors", []), {"pointer": pointer, "detail": detail}]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch says so in three ways: a type on the accelerator, and two wordings on the CPU."""
    text = str(error)
    return (
        isinstance(error, OutOfMemory | MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and ("can't allocate memory" in text or "not enough memory" in text))
    )


def is_the_hosts(error: BaseException) -> bool:
    """Whether the accelerator or the disk failed: elsewhere, or later, the same job may well succeed."""
    return any(
        "CUDA error" in str(it)
        or (isinstance(it, OSError) and it.errno in HOST_ERRNOS)
        or any(f"(os error {number})" in str(it) for number in HOST_ERRNOS)  # safetensors has it in words alone
        for it in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def escaped(name: str) -> str:
    """A name as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
