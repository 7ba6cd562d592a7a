"""The benchmark of the queue, at a tiny size: it runs, and gives the figures that it promises."""

from __future__ import annotations

import pytest

from benchmarks import queue


def test_growth_is_measured_for_every_step_and_its_statements_shown(capsys: pytest.CaptureFixture[str]) -> None:
    figures = queue.run(queue.TINY)

    assert set(figures) == {"claim_growth", "renew_growth", "dispatch_growth"}
    assert all(figure > 0 for figure in figures.values())
    printed = capsys.readouterr().out
    assert "Index Scan using pk_jobs on jobs" in printed  # claim and renew
    assert "ix_jobs_queued" in printed  # what is due
    assert "Seq Scan on jobs" not in printed
