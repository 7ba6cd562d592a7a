"""How long a server that is away is waited for, and from when that counts."""

from __future__ import annotations

import pytest

from worker import patience
from worker.patience import TRIES_AT_LEAST, Headway, StayedAway, patiently


class Transfer:
    """Comes so many bytes far in each try and breaks off; whole at the end."""

    def __init__(self, *tries: int) -> None:
        self.headway, self._left = Headway(), list(tries)

    def __call__(self) -> str:
        arrived = self.headway.along("file")
        for count in range(1, self._left.pop(0) + 1):
            arrived(count)
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


def test_bytes_that_are_asked_for_again_within_a_try_are_no_headway() -> None:
    arrived = (headway := Headway()).along("file")
    for count in (5, 8, 3, 5, 8, 3, 8):  # the part behind the third always breaks off
        arrived(count)

    assert headway.steps == 2


def test_other_files_have_a_way_of_their_own() -> None:
    headway = Headway()
    for name in ("one", "one", "another"):
        headway.along(name)(7)

    assert headway.steps == 2
