"""What a run of Selective Amnesia announced, and how a later run gets it."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.worker.runs import Bench, Ended


def phases_of(ended: Ended) -> list[str]:
    """The phases that a run announced, in their order."""
    return [message["phase"] for message in ended.messages if message["type"] == "phase"]


def assets_of(bench: Bench, ended: Ended) -> dict[str, Path]:
    """The assets that a run announced, by name."""
    return {one["name"]: bench.folder / one["path"] for one in ended.messages if one["type"] == "asset"}


def given(bench: Bench, assets: dict[str, Path]) -> Bench:
    """Put assets into the inputs of a later job."""
    folder = bench.folder / "inputs" / "fisher"
    folder.mkdir(parents=True)
    for name, path in assets.items():
        shutil.copy(path, folder / f"{name}.safetensors")
    bench.job["inputs"]["fisher"] = {name: f"inputs/fisher/{name}.safetensors" for name in assets}
    return bench
