"""What an attempt works out before it trains outlives it: the next goes on from there, and comes to the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.worker.prompt_jobs import (
    FORGOTTEN,
    KEPT,
    REPLACING,
    Dying,
    Job,
    Killed,
    killed,
    signals_restored,
    terminated,
    untrained_pipeline,
)
from tests.worker.runs import one_thread
from unlearning import State
from worker.runner import contract, fisher, own_samples, states
from worker.runner.contract import Interrupted
from worker.runner.fisher import fisher_of_parts

EXAMPLES, AT_ONCE = 10, 3
"""Of a label: what is asked for, and what is drawn at once, the last time less."""
MOST = 12
"""Attempts, after which a job comes to no end."""
SQUARED, TIMESTEPS = 2, 3
"""Examples of a label in its Fisher information, and draws of each."""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline."""
    return untrained_pipeline(tmp_path_factory.mktemp("base") / "base.safetensors")


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    """Little work, each step of which is told."""
    with pytest.MonkeyPatch.context() as patch, signals_restored(), one_thread():
        patch.setattr(own_samples, "STOCK", 0)
        patch.setattr(own_samples, "DRAWN_AT_ONCE", AT_ONCE)
        patch.setattr(fisher, "SLOW_EXAMPLES", SQUARED)
        patch.setattr(fisher, "TIMESTEPS", TIMESTEPS)
        patch.setattr(contract, "PROGRESS_SECONDS", 0.0)
        yield


@pytest.fixture
def saves_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever may be saved is saved."""
    monkeypatch.setattr(states, "LONGEST_SECONDS", 0.0)


Work = Callable[[Job], None]


def draws(job: Job) -> None:
    """What a job does first: of what it keeps, and of what it is to forget."""
    job.own.examples([KEPT, FORGOTTEN], 2 * EXAMPLES, "any")


def squares(job: Job) -> None:
    """What it does next, where all labels are in the penalty: one of them is private."""
    fisher_of_parts(job.base, job.own, [FORGOTTEN, KEPT, REPLACING], job.assets, job.reporter)


@dataclass
class Attempts:
    """Attempts at one job, and what the supervisor has of them: the newest file of each name."""

    folder: Path
    file: Path
    had: dict[str, Path] = field(default_factory=dict)
    all: list[Job] = field(default_factory=list)

    def one(self, work: Work, at: int = 0, how: Callable[[], None] = killed) -> Job | None:
        """One attempt, which ends with its n-th word of progress; None if it came to its end."""
        number = len(self.all)
        job = Job(self.folder / str(number), self.file, given=self.had, reporter=Dying(at, how))
        self.all.append(job)
        try:
            with job.stop.at_once():
                work(job)
        except (Interrupted, Killed):
            return job
        finally:
            self.had = {**self.had, **job.left()}
        return None

    def until_done(self, work: Work, at: int, how: Callable[[], None]) -> None:
        """As many as it takes."""
        while self.one(work, at, how) is not None:
            assert len(self.all) < MOST, self.steps

    @property
    def steps(self) -> list[list[int]]:
        """How far each said that it was."""
        return [job.steps for job in self.all]

    @property
    def samples(self) -> dict[str, Path]:
        """What was drawn, by name."""
        return {name: path for name, path in self.had.items() if name.startswith("examples-")}

    @property
    def finished(self) -> dict[str, bytes]:
        """What is whole, by name."""
        return {name: path.read_bytes() for name, path in self.had.items() if not name.startswith("partial-")}


@pytest.fixture
def cut(file: Path, tmp_path: Path) -> Attempts:
    """Attempts that will be cut short."""
    return Attempts(tmp_path, file)


@pytest.fixture(scope="module")
def drawn(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Attempts:
    """One that was not, and drew."""
    attempts = Attempts(tmp_path_factory.mktemp("drawn"), file)
    attempts.one(draws)
    return attempts


@pytest.fixture(scope="module")
def squared(drawn: Attempts, tmp_path_factory: pytest.TempPathFactory) -> Attempts:
    """One that went on to the end."""
    attempts = Attempts(tmp_path_factory.mktemp("squared"), drawn.file, drawn.had)
    attempts.one(squares)
    return attempts


# Dying at every boundary there is.


def test_drawing_goes_on_where_sigterm_cut_it(drawn: Attempts, cut: Attempts) -> None:
    cut.until_done(draws, 1, terminated)

    # Of each attempt one word: each chunk of both labels was drawn once.
    assert drawn.steps == [[3, 6, 9, 10, 13, 16, 19, 20]]
    assert cut.steps == [[3], [6], [9], [10], [3], [6], [9], [10], []]
    assert cut.finished == drawn.finished


@pytest.mark.usefixtures("saves_always")
def test_drawing_goes_on_from_what_was_saved_before_a_kill(drawn: Attempts, cut: Attempts) -> None:
    cut.until_done(draws, 2, killed)

    # The last chunk that an attempt tells of is lost with it.
    assert cut.steps == [[3, 6], [6, 9], [9, 10], [10, 13], [3, 6], [6, 9], [9, 10], [10]]
    assert cut.finished == drawn.finished


def test_sigterm_in_the_middle_of_a_chunk_waits_for_nothing(drawn: Attempts, cut: Attempts) -> None:
    def cut_in_the_second_chunk(job: Job) -> None:
        model: Any = job.base.model
        model.unet.register_forward_hook(lambda *_: terminated() if job.steps else None)
        draws(job)

    cut.one(cut_in_the_second_chunk)
    cut.one(draws)

    assert cut.steps == [[3], [6, 9, 10, 13, 16, 19, 20]]
    assert cut.finished == drawn.finished


def test_sigterm_finds_rows_and_where_their_generator_stood_together(drawn: Attempts, cut: Attempts) -> None:
    class Torn(own_samples._Drawn):
        """SIGTERM comes as the rows are there and the generator's state is not."""

        def add(self, part: Tensor) -> None:
            self._parts.append(part)
            terminated()
            self._parts.pop()
            super().add(part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_samples, "_Drawn", Torn)
        cut.one(draws)
    cut.one(draws)

    assert cut.steps == [[3], [6, 9, 10, 13, 16, 19, 20]]
    assert cut.finished == drawn.finished


def test_squaring_goes_on_where_sigterm_cut_it(squared: Attempts, cut: Attempts) -> None:
    cut.had = squared.samples

    cut.until_done(squares, 1, terminated)

    assert squared.steps == [[3, 6, 9, 10, 1, 2, 3, 4, 5, 6]]  # what only replaces is drawn first
    assert cut.steps == [[1], [2], [1], [2], [1], [2], []]
    assert cut.finished == squared.finished


@pytest.mark.usefixtures("saves_always")
def test_squaring_goes_on_from_what_was_saved_before_a_kill(squared: Attempts, cut: Attempts) -> None:
    cut.had = squared.samples

    cut.one(squares, 4, killed)  # in the second part
    cut.one(squares)

    assert cut.steps == [[1, 2, 3, 4], [2, 3, 4]]
    assert cut.finished == squared.finished


# What is found, and what is not.


def test_what_is_private_is_there_for_the_next_attempt_and_nobody_else(
    drawn: Attempts, squared: Attempts, cut: Attempts
) -> None:
    cut.had = squared.had

    def both(job: Job) -> None:
        draws(job)
        squares(job)

    cut.one(both)

    assert cut.steps == [[]]
    assert cut.all[0].left() == {}
    tokens = squared.all[0].base.conditions.trained(FORGOTTEN)[0].numpy().tobytes()
    jobs = [*drawn.all, *squared.all]
    own, public = ([path for job in jobs for path in job.left(scope).values()] for scope in ("job", "checkpoint"))
    assert any(tokens in path.read_bytes() for path in own)
    assert not any(tokens in path.read_bytes() for path in public)
    assert sorted({path.name.partition("-")[0] for path in own} - {"partial"}) == ["examples", "fisher"]
    assert sorted(path.name.partition("-")[0] for path in public) == ["examples"] * 2 + ["fisher"] * 2


@pytest.mark.parametrize("work", [draws, squares])
def test_a_damaged_beginning_is_left_out(
    work: Work, squared: Attempts, cut: Attempts, capfd: pytest.CaptureFixture[str]
) -> None:
    if work is squares:
        cut.had = squared.samples
    cut.one(work, 1, terminated)
    [(name, path)] = [(name, path) for name, path in cut.had.items() if name.startswith("partial-")]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the supervisor's digest would say so; this is what it cannot see
    path.write_bytes(content)

    cut.one(work)

    assert cut.steps[1][0] == cut.steps[0][0]
    assert f"{name} is made anew" in capfd.readouterr().err
    assert all(squared.finished[name] == content for name, content in cut.finished.items())


def test_a_beginning_of_something_else_is_left_out(drawn: Attempts, cut: Attempts, tmp_path: Path) -> None:
    other = Attempts(tmp_path / "other", untrained_pipeline(tmp_path / "other.safetensors", seed=1))
    other.one(draws, 1, terminated)
    cut.had = other.had

    cut.one(draws)

    assert cut.steps == drawn.steps
    assert cut.finished == drawn.finished


def test_a_state_that_squaring_refuses_is_left_out(squared: Attempts, cut: Attempts) -> None:
    cut.had = squared.samples
    cut.one(squares, 1, terminated)
    state = State.load(cut.had["partial-fisher"])
    State(state.tensors, {**state.meta, "fingerprint": "of an older release"}).save(cut.had["partial-fisher"])

    cut.one(squares)

    assert cut.steps == [[1], [1, 2, 3, 4, 5, 6]]
    assert cut.finished == squared.finished


# What is said meanwhile.


def test_drawing_says_when_it_will_be_done(drawn: Attempts) -> None:
    said = [one for one in drawn.all[0].reporter.messages if one["type"] in ("phase", "progress")]

    assert said[0] == {"type": "phase", "phase": "replay"}
    assert {(one["phase"], one["total"]) for one in said[1:]} == {("replay", 2 * EXAMPLES)}
    assert all(one["eta_seconds"] >= 0 for one in said[1:])
    assert said[-1]["eta_seconds"] == 0


def test_each_write_has_a_file_of_its_own(cut: Attempts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(states, "LONGEST_SECONDS", 0.0)

    cut.one(draws)

    paths = [one["path"] for one in cut.all[0].reporter.messages if one["type"] == "asset"]
    assert len(set(paths)) == len(paths) > 6
