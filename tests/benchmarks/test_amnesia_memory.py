"""The benchmark of Selective Amnesia's memory: what its figures are made of, and that it estimates its own step."""

from __future__ import annotations

import json

import pytest

from benchmarks.amnesia_memory import CARD_GIB, CASES, Case, Row, measure, on_card, summary

ROWS = [Row(CASES[0], 6.0, 5.0, 9.0, 30.0), Row(CASES[3], 4.5, 5.0, 8.0, 20.0)]


def test_ratios_are_of_estimate_to_measurement_and_what_is_extrapolated_says_so() -> None:
    card = [
        {"scope": "all", "optimiser": name, "recompute": on, "gib": 1.0}
        for name in ("adam", "adam-8bit")
        for on in (False, True)
    ]
    figures = summary(ROWS, card, {"kept": 9.0, "recomputed": 8.0}, quick=True)

    assert figures["ratio_range"] == [0.9, 1.2]
    assert figures["full_scope_is_extrapolated"] is True
    assert figures["card_gib"] == CARD_GIB
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_less_is_trained_smaller_moments_and_activations_computed_twice_take_less_of_a_card() -> None:
    taken = {(one["scope"], one["optimiser"], one["recompute"]): one for one in on_card(quick=True, latent=32)}

    assert len(taken) == 12
    for scope in ("all", "cross-attention"):
        assert taken[scope, "adam", True]["gib"] < taken[scope, "adam", False]["gib"]
        assert taken[scope, "adam", True]["rows_within_card"] > taken[scope, "adam", False]["rows_within_card"]
    assert taken["all", "adam-8bit", False]["gib"] < taken["all", "adam", False]["gib"]
    assert taken["cross-attention", "adam", False]["gib"] < taken["all", "adam", False]["gib"]


def test_a_step_takes_about_what_was_estimated() -> None:
    row = measure(Case("all", 1.0, 16, True), quick=True)

    assert 0 < row.estimated_gib < row.peak_gib
    assert row.seconds > 0
    assert row.ratio == pytest.approx(row.estimated_gib / row.measured_gib)
