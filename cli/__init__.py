"""The ``forgetd`` command, and the Python client: ``from cli import Client``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cli.client import Client
    from cli.errors import ClientError, CriteriaNotMet, JobFailed, ProblemError, Unreachable

__all__ = ["Client", "ClientError", "CriteriaNotMet", "JobFailed", "ProblemError", "Unreachable"]


def __getattr__(name: str) -> Any:
    # httpx is loaded by those who call the service: ``forgetd --help`` is not one of them.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module("cli.client" if name == "Client" else "cli.errors")
    return getattr(module, name)
