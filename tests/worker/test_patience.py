"""How long a server that is away is waited for, and from when that counts."""

from __future__ import annotations

import pytest

from worker import patience
from worker.patience import TRIES_AT_LEAST, Headway, StayedAway, patiently


class Transfer:
    """Passes so many chunks in each try and breaks off; whole at the end."""

    def __init__(self, *tries: int) -> None:
        self.headway, self._left = Headway(), list(tries)

    def __call__(self) -> str:
        going_on = self.headway.along("file", lambda: True)
        for _ in range(self._left.pop(0)):
            assert going_on()
        if self._left:
            raise ConnectionError
        return "whole"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_PAUSE_SECONDS", 0.0)


def fetch(transfer: Transfer) -> str:
    """No more tries than are made at least."""
    return patiently(
        transfer,
        away=lambda error: isinstance(error, ConnectionError),
        going_on=lambda: True,
        what="file",
        within=0.0,
        headway=transfer.headway,
    )


def test_patience_begins_anew_once_bytes_have_passed() -> None:
    fruitless = [0] * (TRIES_AT_LEAST - 1)

    assert fetch(Transfer(*fruitless, 5, *fruitless[1:], 9, *fruitless[1:], 12)) == "whole"


def test_bytes_that_had_passed_before_are_no_headway() -> None:
    with pytest.raises(StayedAway):
        fetch(Transfer(*[7] * (TRIES_AT_LEAST + 1), 9))


def test_other_files_have_a_way_of_their_own() -> None:
    headway = Headway()
    for name in ("one", "one", "another"):
        headway.along(name, lambda: True)()

    assert headway.steps == 2
