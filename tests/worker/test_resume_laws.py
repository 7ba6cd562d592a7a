"""Law: a run that is stopped at every one of its boundaries ends with the bits of one that nobody stopped.

The runner is killed as soon as it has told of a state, at each step, and the next attempt starts from that file with
what the supervisor would give it: a model of its own, generators of its own, nothing of the process before. Each state
on the way is compared with that of the run that nobody stopped, so that one chain shows for each boundary alone that
a run goes on from it as if nothing had happened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from services.job_checks import METHODS_OF_FAMILY
from services.method_options import METHODS, FlowTamingOptions
from tests.worker.prompt_jobs import Killed, signals_restored
from tests.worker.resume_jobs import AMNESIA, REMOVAL, ROWS, STEERING, TAMING, Row, write_base
from tests.worker.runs import Bench, Recorder, one_thread
from unlearning import State
from worker.runner import contract, fisher, own_samples, states
from worker.runner.__main__ import module_of
from worker.runner.contract import Stop

HOW_IT_WENT = ("attempt", "seconds", "resumed_from_step", "fisher_parts_computed")
"""What two runs with the same outcome may tell differently: times, and what was found of an earlier attempt."""


@pytest.fixture(autouse=True, scope="module")
def _small_and_told() -> Iterator[None]:
    """Little is drawn and squared; every step is saved and told; bits are those of one thread."""
    with pytest.MonkeyPatch.context() as patch, signals_restored(), one_thread():
        patch.setattr(own_samples, "STOCK", 0)
        patch.setattr(fisher, "SLOW_EXAMPLES", 2)
        patch.setattr(fisher, "TIMESTEPS", 2)
        patch.setattr(contract, "PROGRESS_SECONDS", 0.0)
        patch.setattr(states, "LONGEST_SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are kept for all rows of a family."""
    return tmp_path_factory.mktemp("bases")


class Mortal(Recorder):
    """A runner that is killed once it has told of a state, of which a copy is all that is left."""

    def _say(self, message: dict[str, Any]) -> None:
        super()._say(message)
        if message["type"] == "state":
            raise Killed


@dataclass
class Attempts:
    """Attempts at one job, each from the newest state and with the assets of those before it."""

    row: Row
    folder: Path
    base: Path
    messages: list[list[dict[str, Any]]] = field(default_factory=list)
    states: dict[int, State] = field(default_factory=dict)
    last: Bench | None = None

    def one(self, reporter: Recorder) -> Bench | None:
        """One attempt; None if it was killed."""
        before, number = self.last, len(self.messages)
        bench = Bench(self.folder / str(number), self.base)
        self.row.prepare(bench)
        bench.job["method"] = self.row.method
        if self.row.steps:
            bench.job["parameters"]["max_steps"] = self.row.steps
        if before is not None:
            self._hand_over(before, bench)
        self.last = bench
        self.messages.append(reporter.messages)
        torch.manual_seed(number)  # nothing may depend on where torch's own generator happens to stand
        try:
            module_of(bench.job).run(bench.job, bench.folder, reporter, Stop())
        except Killed:
            return None
        finally:
            for path in (bench.folder / "state").iterdir():
                self.states[int(path.stem)] = State.load(path)
        return bench

    def _hand_over(self, before: Bench, bench: Bench) -> None:
        """As the supervisor does."""
        found = [one for one in self.messages[-1] if one["type"] == "asset"]
        known = before.job["inputs"].get("fisher") or {}
        if "fisher" in bench.job["inputs"]:
            bench.job["inputs"]["fisher"] = known | {one["name"]: str(before.folder / one["path"]) for one in found}
        bench.resume_from(max((before.folder / "state").iterdir()))

    @property
    def steps(self) -> list[list[int]]:
        """The steps that each attempt took."""
        return [
            [one["step"] for one in said if one["type"] == "progress" and one["phase"] == "unlearning"]
            for said in self.messages
        ]

    def outcome(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The last word of the last attempt, and its report."""
        assert self.last is not None
        assert self.messages[-1][-1]["type"] == "result", self.messages[-1][-1]
        return without_times(self.messages[-1][-1]), without_times(self.last.report())


def without_times(value: Any) -> Any:
    """JSON without how it went."""
    if isinstance(value, dict):
        return {name: without_times(one) for name, one in value.items() if name not in HOW_IT_WENT}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def assert_same_state(found: State, expected: State) -> None:
    """Weights, moments, generators and history, to the bit."""
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(value, expected.tensors[name]) for name, value in found.tensors.items())
    assert {**found.meta, "seconds": 0} == {**expected.meta, "seconds": 0}  # how long it took, which nothing depends on


def test_every_method_and_every_family_has_a_row() -> None:
    rows = list(ROWS.values())

    assert {row.method for row in rows} == set(METHODS)
    assert {row.family for row in rows} == set(METHODS_OF_FAMILY)
    assert all(row.method in METHODS_OF_FAMILY[row.family] for row in rows)
    engines, _none = get_args(FlowTamingOptions.model_fields["engine"].annotation)
    assert {row.engine for row in rows if row.method == TAMING} == set(get_args(engines))
    assert {row.method for row in rows if row.kind == "debias"} == {STEERING, REMOVAL, AMNESIA}


@pytest.mark.parametrize("name", ROWS)
def test_a_run_killed_at_every_boundary_ends_as_one_that_was_not(
    name: str, bases: Path, vae_file: Path, tmp_path: Path
) -> None:
    row = ROWS[name]
    base = write_base(row, bases, vae_file)
    whole, killed = (Attempts(row, tmp_path / kind, base) for kind in ("whole", "killed"))

    expected = whole.one(Recorder())
    while (found := killed.one(Mortal())) is None:
        assert len(killed.messages) <= row.steps

    assert expected is not None
    boundaries = list(range(1, row.steps + 1))
    assert killed.steps == [[step] for step in boundaries] + [[]]  # none is taken twice
    assert sorted(killed.states) == sorted(whole.states) == boundaries
    for step in boundaries:
        assert_same_state(killed.states[step], whole.states[step])
    tensors = [load_file(bench.folder / "outputs" / "tamed.safetensors") for bench in (found, expected)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][key]) for key, value in tensors[0].items())
    assert killed.outcome() == whole.outcome()
