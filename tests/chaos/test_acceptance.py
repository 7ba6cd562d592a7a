"""A 202 outlives its gateway, and many calls with one key are one job; a thousand of each: tests.chaos.acceptance."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.acceptance import killed_after_accepting, one_key_by_many, serving

TIMES = 25


def test_what_was_accepted_is_there_and_one_key_is_one_job(tmp_path: Path) -> None:
    with serving(tmp_path) as gateway:
        accepted, present = killed_after_accepting(gateway, TIMES)
        answered, answers, jobs = one_key_by_many(gateway, TIMES)

    assert (accepted, present) == (TIMES, TIMES)
    assert (answered, answers, jobs) == (TIMES, 1, 1)
