"""The monkey does what it was asked to: a fault that found nothing to break is none, and another takes its place."""

from __future__ import annotations

import random
from typing import cast

import pytest

from tests.chaos import monkey
from tests.chaos.faults import Broken, Fault, Kind
from tests.chaos.fleet import Fleet
from tests.chaos.monkey import Monkey

FLEET = cast(Fleet, None)  # nothing here looks at it


def _hits(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    return True


def _misses(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    return False


def _fails(fleet: Fleet, draw: random.Random, broken: Broken) -> bool:
    raise OSError("the harness is broken")


@pytest.fixture(autouse=True)
def _catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    acts = {"hit": _hits, "miss": _misses, "fail": _fails}
    monkeypatch.setattr(monkey, "CATALOGUE", {name: Kind(act, name, 1) for name, act in acts.items()})


def _done(faults: list[str], spares: list[str]) -> Monkey:
    it = Monkey(FLEET, [Fault(kind, 0) for kind in faults], [Fault(kind, 0) for kind in spares], 0.0)
    it.start()
    it.finish()
    return it


@pytest.mark.parametrize(
    ("faults", "spares", "hits", "missed"),
    [
        (["hit"] * 3, ["hit"] * 3, 3, 0),
        (["hit", "miss"], ["hit"] * 3, 2, 1),
        (["miss"], ["miss", "miss", "hit", "hit"], 1, 3),
        (["miss", "hit"], ["miss"], 1, 2),
    ],
)
def test_what_missed_is_made_up_for_while_there_are_spares(
    faults: list[str], spares: list[str], hits: int, missed: int
) -> None:
    done = _done(faults, spares)

    assert (done.hits, done.missed) == (hits, missed)
    assert set(done.done) <= {"hit", "miss"}
    assert done.done["miss"] == 0


def test_a_fault_that_cannot_be_done_ends_the_run() -> None:
    with pytest.raises(OSError, match="harness"):
        _done(["hit", "fail"], [])
