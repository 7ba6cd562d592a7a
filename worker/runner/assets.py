"""Files that a checkpoint's jobs leave to each other: found among a job's inputs, or made and announced."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from worker.runner.contract import Reporter

__all__ = ["AssetFolder"]

FOLDER = "assets"

T = TypeVar("T")


class AssetFolder:
    """The assets of one job's checkpoint. A name is a digest of all that a file depends on.

    Args:
        job: its inputs name the files that are there.
        folder: the job's.
        reporter: told of what is made.
    """

    def __init__(self, job: Mapping[str, Any], folder: Path, reporter: Reporter) -> None:
        self._given: Mapping[str, str] = job["inputs"].get("fisher") or {}
        self._folder, self._reporter = folder, reporter

    @staticmethod
    def name(kind: str, facts: Sequence[object]) -> str:
        """The name of what these JSON facts lead to."""
        return f"{kind}-{hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()[:40]}"

    def found(self, name: str, load: Callable[[Path], T], refusals: type[Exception]) -> T | None:
        """What is in the file of a name; None where there is none, or one that `load` refuses: it is made anew."""
        if name not in self._given:
            return None
        try:
            return load(self._folder / self._given[name])
        except refusals as error:
            sys.stderr.write(f"the asset {name} is made anew: {error}\n")
            return None

    def keep(self, name: str, save: Callable[[Path], None]) -> None:
        """Write a file, whole, and announce it."""
        path = self._folder / FOLDER / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save(path)
        self._reporter.asset(path, self._folder, name=name)
