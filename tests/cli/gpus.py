"""A torch that sees as many GPUs as a test says, for the processes that ask it: no test machine has eight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tests.cli.processes import ROOT

__all__ = ["torch_that_sees"]

MODULE = """
import os

NAMES = {names!r}


class cuda:
    @staticmethod
    def _seen():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        return NAMES if visible is None else [NAMES[int(number)] for number in visible.split(",") if number]

    @staticmethod
    def is_available():
        return bool(cuda._seen())

    @staticmethod
    def device_count():
        return len(cuda._seen())

    @staticmethod
    def get_device_name(number):
        return cuda._seen()[number]
"""


def torch_that_sees(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """The variable that puts it before the real one."""
    home = folder / "other-torch"
    (home / "torch").mkdir(parents=True)
    (home / "torch" / "__init__.py").write_text(MODULE.format(names=list(names)))
    return {"PYTHONPATH": os.pathsep.join([str(home), str(ROOT)])}
