"""How a job of Selective Amnesia is changed, what its run announced, and how a later run gets that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.worker.runs import Bench, Ended

QUICK = {"max_steps": 1500, "batch": 64, "learning_rate": 3e-3}
"""Parameters that suit the tiny VAE."""


def changed(**changes: Any) -> Callable[[Bench], None]:
    """A change of a job, for tables of what is refused."""
    return lambda bench: bench.job.update(changes)


def phases_of(ended: Ended) -> list[str]:
    """The phases that a run announced, in their order."""
    return [message["phase"] for message in ended.messages if message["type"] == "phase"]


def assets_of(bench: Bench, ended: Ended) -> dict[str, Path]:
    """The assets of the checkpoint that a run announced, by name."""
    kept = [one for one in ended.messages if one["type"] == "asset" and one["scope"] == "checkpoint"]
    return {one["name"]: bench.folder / one["path"] for one in kept}


def given(bench: Bench, assets: dict[str, Path]) -> Bench:
    """Put assets into the inputs of a later job."""
    folder = bench.folder / "inputs" / "fisher"
    folder.mkdir(parents=True)
    for name, path in assets.items():
        shutil.copy(path, folder / f"{name}.safetensors")
    bench.job["inputs"]["fisher"] = {name: f"inputs/fisher/{name}.safetensors" for name in assets}
    return bench
