"""Which GPUs torch sees on this host, asked of a process of its own: nothing here imports torch."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ANSWER_SECONDS", "VISIBLE", "Seen", "look"]

ANSWER_SECONDS = 60.0  # the import of torch from a cold disk takes most of it
VISIBLE = "CUDA_VISIBLE_DEVICES"
PROGRAM = """
import json, torch
found = torch.cuda
print(json.dumps([found.get_device_name(n) for n in range(found.device_count())] if found.is_available() else []))
"""


@dataclass(frozen=True)
class Seen:
    """The names of the GPUs, in torch's order; ``problem`` says why torch could not be asked."""

    names: tuple[str, ...] = ()
    problem: str = ""
    installed: bool = True


def look(environment: Mapping[str, str] | None = None, *, seconds: float = ANSWER_SECONDS) -> Seen:
    """Ask torch, in this environment or another."""
    if importlib.util.find_spec("torch") is None:
        return Seen(problem="torch is not installed", installed=False)
    try:
        done = subprocess.run(  # noqa: S603 our own interpreter and a constant program
            [sys.executable, "-c", PROGRAM],
            env=dict(os.environ if environment is None else environment),
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Seen(problem=f"torch did not say within {seconds:g} s which GPUs it sees")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        return Seen(problem=f"torch does not load: {last[:200]}")
    return Seen(tuple(json.loads(done.stdout.strip().splitlines()[-1])))
