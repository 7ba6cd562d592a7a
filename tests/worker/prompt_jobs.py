"""Attempts at a job on a tiny pipeline, up to its training: they draw and square, and die wherever a test lets them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints import save_checkpoint
from tests.models.sd_cases import POSITIONS, tiny
from tests.worker.runs import Bench, Recorder
from worker.runner.assets import AssetFolder
from worker.runner.conditional_base import ConditionalBase, load_conditional_base
from worker.runner.contract import Stop
from worker.runner.own_samples import StoredSamples

FORGOTTEN, KEPT, REPLACING = 0, 1, 2
PROMPTS_TOO_LONG = 24
"""Tokens that the longest phrasing of these words takes, of this tokenizer's few."""


def untrained_pipeline(path: Path, seed: int = 0) -> Path:
    """An untrained pipeline, whose text encoder reads every phrasing."""
    model = tiny(seed, text_encoder={"max_position_embeddings": POSITIONS + 5 * PROMPTS_TOO_LONG})
    save_checkpoint(path, model)
    return path


@contextmanager
def signals_restored() -> Iterator[None]:
    """Around jobs of this process, each of which listens to SIGTERM."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Killed(BaseException):
    """The process is no more."""


class Dying(Recorder):
    """A runner that meets its end with its n-th word of progress.

    Args:
        at: n, from 1; 0 never.
        how: raises what ends it, or a signal.
    """

    def __init__(self, at: int = 0, how: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self._left, self._how = at, how

    def _say(self, message: dict[str, Any]) -> None:
        super()._say(message)
        if message["type"] == "progress":
            self._left -= 1
            if self._left == 0:
                self._how()


def terminated() -> None:
    """SIGTERM, now."""
    signal.raise_signal(signal.SIGTERM)


def killed() -> None:
    """As SIGKILL: nothing more is said or done."""
    raise Killed


class Job:
    """One attempt at a job on the pipeline, with what it finds of earlier ones."""

    def __init__(
        self,
        folder: Path,
        file: Path,
        images: dict[int, Tensor] | None = None,
        *,
        given: dict[str, Path] | None = None,
        reporter: Recorder | None = None,
    ) -> None:
        bench = Bench(folder, file)
        bench.job.update(target={"concept": "zero"}, replace_with={"concept": "photo"})
        bench.job.update(remember={"concepts": ["one"], "generated": 64})
        bench.job["inputs"]["fisher"] = {name: str(path) for name, path in (given or {}).items()}
        self.folder, self.reporter, self.stop = folder, reporter or Recorder(), Stop()
        self.base: ConditionalBase = load_conditional_base(bench.job, folder)
        self.assets = AssetFolder(bench.job, folder, self.reporter, self.stop)
        self.own = StoredSamples(self.base, self.assets, self.reporter, images or {})

    def left(self, *scopes: str) -> dict[str, Path]:
        """The newest file of each name that it announced, of all scopes by default."""
        said = [one for one in self.reporter.messages if one["type"] == "asset"]
        return {one["name"]: self.folder / one["path"] for one in said if not scopes or one["scope"] in scopes}

    @property
    def steps(self) -> list[int]:
        """How far it said that it was."""
        return [one["step"] for one in self.reporter.messages if one["type"] == "progress"]


def noise(n: int, *shape: int) -> Tensor:
    """n pictures that show nothing, uint8."""
    return torch.randint(256, (n, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
