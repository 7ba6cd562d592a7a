"""Files that jobs leave to each other, and attempts to the next one: found among a job's inputs, or made and announced.

What depends on a checkpoint alone is for all of its jobs; what is private, or not finished yet, is for this one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open

from models.checkpoints import tensor_digest
from unlearning import State, StateError
from unlearning.state import METADATA_KEY
from worker.runner.contract import Reporter, Stop
from worker.runner.states import Cadence

__all__ = ["AssetFolder"]

FOLDER = "assets"
OF, DIGEST = "of", "tensors_sha256"
"""What the state of something unfinished says beside its maker's own words: its name once finished, and its content."""

T = TypeVar("T")


class AssetFolder:
    """What one job finds and leaves. A name is a digest of all that a file depends on.

    Args:
        job: its inputs name the files that are there.
        folder: the job's.
        reporter: told of what is made.
        stop: for those who make what takes long, to say where SIGTERM may cut them.
    """

    def __init__(self, job: Mapping[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
        self._given: Mapping[str, str] = job["inputs"].get("fisher") or {}
        self._folder, self._reporter, self.stop = folder, reporter, stop
        self._numbers, self._cadence = itertools.count(1), Cadence()

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

    def keep(self, name: str, save: Callable[[Path], None], *, private: bool = False) -> None:
        """Write a file, whole, and announce it.

        Args:
            name: as `name` made it.
            save: writes it.
            private: nothing of it may outlive the job.
        """
        if private:
            return self._keep_own(name, save)
        path = self._folder / FOLDER / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save(path)
        self._reporter.asset(path, self._folder, name=name, scope="checkpoint")

    def unfinished(self, kind: str, name: str) -> State | None:
        """How far an earlier attempt came with what will have this name; None: not at all, or with something else."""
        return self.found(_partial(kind), partial(_state_of, name), StateError)

    def offer(self, kind: str, name: str, capture: Callable[[], State]) -> None:
        """Save how far it is if it is time; see `save`."""
        if self._cadence.due():
            self.save(kind, name, capture)

    def save(self, kind: str, name: str, capture: Callable[[], State]) -> None:
        """Leave to the next attempt how far the making of a file is, in the place of what was left of its kind.

        Args:
            kind: of what is made one after another.
            name: of the file, once it is finished.
            capture: gives what its making can go on from.
        """
        with self._cadence.saving():
            state = capture()
            meta = {**state.meta, OF: name, DIGEST: tensor_digest(state.tensors)}
            self._keep_own(_partial(kind), State(state.tensors, meta).save)

    def _keep_own(self, name: str, save: Callable[[Path], None]) -> None:
        # Each into a file of its own: what is announced may be on its way to the store while the next one is written.
        path = self._folder / FOLDER / f"{name}.{next(self._numbers)}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save(path)
        self._reporter.asset(path, self._folder, name=name, scope="job")


def _partial(kind: str) -> str:
    """One name for all of a kind, of which one is made at a time: the newest replaces the others."""
    return f"partial-{kind}"


def _state_of(name: str, path: Path) -> State | None:
    """The state in a file, if it is on the way to what has this name.

    Raises:
        StateError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:  # its head alone: the rest may be as large as the model
            meta = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise StateError(f"the state cannot be read: {error}") from error
    if meta.get(OF) != name:
        return None
    state = State.load(path)
    if tensor_digest(state.tensors) != meta.get(DIGEST):
        raise StateError("its content was altered")
    return state
