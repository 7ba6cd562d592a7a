"""What a check says, and how checks are asked: beside each other, each with a limit, so that none hangs the rest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Check", "Finding", "ask", "first_line", "ok", "warning", "wrong"]

State = Literal["ok", "warning", "wrong"]
LINE_CHARACTERS = 300


@dataclass(frozen=True)
class Finding:
    """What one look found: of what, how it is, in a line, and what mends it."""

    check: str
    state: State
    says: str
    mend: str = ""


def ok(check: str, says: str) -> Finding:
    """As it should be."""
    return Finding(check, "ok", says)


def warning(check: str, says: str, mend: str) -> Finding:
    """It works, and something about it deserves a look."""
    return Finding(check, "warning", says, mend)


def wrong(check: str, says: str, mend: str) -> Finding:
    """Something does not work because of it."""
    return Finding(check, "wrong", says, mend)


def first_line(error: object) -> str:
    """What an error says, in a line."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:LINE_CHARACTERS].rstrip(" .")


@dataclass(frozen=True)
class Check:
    """Questions to one thing, asked one after the other within so many seconds."""

    name: str
    seconds: float
    questions: Callable[[], Iterator[Finding]]
    mend: str  # where no answer comes in time


@dataclass
class _Asked:
    """A check under way, in a thread that the process need not wait for."""

    check: Check
    found: list[Finding] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"check-{self.check.name}", daemon=True).start()

    def _run(self) -> None:
        try:
            for finding in self._each():
                self.found.append(finding)  # one by one: what is there when the time is over counts
        finally:
            self.done.set()

    def _each(self) -> Iterator[Finding]:
        try:
            yield from self.check.questions()
        except Exception as error:  # one check that fails must not silence the others
            says = f"could not be checked ({type(error).__name__}: {first_line(error)})"
            yield wrong(self.check.name, says, self.check.mend)

    def answer(self, until: float) -> list[Finding]:
        """What was found by that time of the monotonic clock."""
        if self.done.wait(max(0.0, until - time.monotonic())):
            return self.found
        late = wrong(self.check.name, f"no answer within {self.check.seconds:g} s", self.check.mend)
        return [*self.found.copy(), late]


def ask(checks: Sequence[Check]) -> list[Finding]:
    """Ask all at once; what they found, in their order. Returns when the slowest limit is over at the latest."""
    began = time.monotonic()
    asked = [_Asked(check) for check in checks]
    for one in asked:
        one.start()
    return [finding for one in asked for finding in one.answer(began + one.check.seconds)]
