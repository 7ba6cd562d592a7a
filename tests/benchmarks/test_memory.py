"""The benchmark of memory: what its figures are made of, without a step."""

from __future__ import annotations

import dataclasses
import json
import math

from benchmarks.memory import GOAL_GIB, IMAGES, Row, summary

PAPER = Row("paper", True, IMAGES, peak_gib=3.0, before_gib=1.0, step_seconds=70.0, setup_seconds=5.0)
FAST = Row("fast", True, IMAGES, peak_gib=1.2, before_gib=1.0, step_seconds=9.0, setup_seconds=5.0)
FEW = Row("paper", False, 4, peak_gib=5.0, before_gib=1.0, step_seconds=20.0, setup_seconds=5.0)
MORE = Row("paper", False, 8, peak_gib=9.0, before_gib=1.0, step_seconds=40.0, setup_seconds=5.0)


def test_peaks_with_and_without_recomputation_stand_side_by_side_as_json() -> None:
    figures = summary(PAPER, FAST, FEW, MORE, "cpu")

    assert (figures["paper_16_gib"], figures["fast_16_gib"]) == (3.0, 1.2)
    assert (figures["without_images"], figures["without_gib"]) == ([4, 8], [5.0, 9.0])
    assert (figures["paper_16_seconds"], figures["without_seconds"]) == (70.0, [20.0, 40.0])
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_what_was_too_large_to_measure_is_extrapolated_along_the_slope_and_says_so() -> None:
    figures = summary(PAPER, FAST, FEW, dataclasses.replace(MORE, peak_gib=10.0), "cpu")

    assert (figures["without_image_gib"], figures["without_16_gib"]) == (1.25, 20.0)
    assert figures["without_16_is_extrapolated"] is True


def test_what_was_measured_at_full_size_is_no_extrapolation() -> None:
    figures = summary(PAPER, FAST, FEW, dataclasses.replace(MORE, images=IMAGES, peak_gib=17.5), "cpu")

    assert (figures["without_16_gib"], figures["without_16_is_extrapolated"]) == (17.5, False)


def test_a_peak_above_the_goal_is_a_miss_however_little_above() -> None:
    above = dataclasses.replace(PAPER, peak_gib=math.nextafter(GOAL_GIB, math.inf))

    assert summary(above, FAST, FEW, MORE, "cpu")["within_goal"] is False
    assert summary(dataclasses.replace(PAPER, peak_gib=GOAL_GIB), FAST, FEW, MORE, "cpu")["within_goal"] is True


def test_a_quick_run_says_nothing_about_the_goal() -> None:
    figures = summary(PAPER, FAST, FEW, MORE, "cuda", quick=True)

    assert (figures["within_goal"], figures["quick"], figures["device"]) == (None, True, "cuda")
