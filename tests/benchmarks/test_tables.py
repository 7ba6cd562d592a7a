"""The benchmark of the paper's tables: what a row is made of, what stands below it, and what the last line says."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from benchmarks.orl_judge import Verdict
from benchmarks.tables import ABLATIONS, DELTAS, NEAREST_OF_PAPER, PAPER, SIZES, Row, row_of, summary
from unlearning import TamingParameters

VERDICT = Verdict(
    confirmed=True, z_min=3.6, q_forget=1e-4, qd_forget=0.5, qd_same=0.25, qd_remember=0.002, qd_unseen=-0.004,
    qd_nearest=0.001, drift=0.1,
)  # fmt: skip
OTHER = dataclasses.replace(VERDICT, qd_same=0.75, qd_remember=-0.004, qd_unseen=-0.008, q_forget=3e-4)
CURVE: list[dict[str, float]] = [
    {"images": 1.0, "q_base": 0.5, "q_tamed": 1e-4, "met": True},
    {"images": 160.0, "q_base": 0.5, "q_tamed": 0.2, "met": False},
]


def row(experiment: str = "identity", delta: float = 4.0, images: int = 4, confirmed: int = 2) -> Row:
    """Two people."""
    return row_of(experiment, delta, images, [VERDICT, OTHER], [2.0, 5.0], confirmed)


def test_a_row_is_the_mean_over_people_and_the_median_of_their_seconds() -> None:
    found = row_of("identity", 4.0, 4, [VERDICT, OTHER, VERDICT], [2.0, 90.0, 4.0], 2)

    assert (found.people, found.confirmed, found.seconds) == (3, 2, 4.0)
    assert math.isclose(found.qd_same, 1.25 / 3)
    assert math.isclose(found.q_forget, 5e-4 / 3)
    assert math.isclose(found.qd_remember, 0.0, abs_tol=1e-12)  # signs are kept: a mean, not a mean of magnitudes


@pytest.mark.parametrize("delta", DELTAS)
@pytest.mark.parametrize("images", SIZES)
def test_below_each_row_stands_that_of_the_paper_for_the_same_delta(images: int, delta: float) -> None:
    ours, below = row(delta=delta, images=images).lines().splitlines()

    _, forget, same, nearest, minutes = PAPER[("identity", delta, NEAREST_OF_PAPER[images])]
    assert "2/2" in ours
    assert below.split()[:3] == ["(paper", f"{delta:.0f}", str(NEAREST_OF_PAPER[images])]
    for shown in (f"{forget:+.2f}", f"{same:+.2f}", f"<={nearest:.2f}", f"{minutes:.1f} min)"):
        assert shown in below


def test_a_row_that_the_paper_does_not_have_stands_alone() -> None:
    assert len(row("outside", delta=4.0).lines().splitlines()) == 2
    assert len(row("outside", delta=3.0).lines().splitlines()) == 1


def test_the_last_line_counts_every_run_and_those_that_were_confirmed() -> None:
    figures = summary([row(), row(images=8, confirmed=0), row("outside", confirmed=1)], [], CURVE, [])

    assert (figures["settings"], figures["runs"], figures["confirmed"]) == (3, 6, 3)
    assert (figures["set_sizes"], figures["set_sizes_met"]) == (2, 1)


def test_the_named_figures_are_those_of_delta_4_within_training_beside_the_papers() -> None:
    rows = [row(images=1), row(images=9), row(delta=2.0, images=4), row("outside", images=8)]

    figures = summary(rows, [], [], [])

    assert (figures["qd_same_1"], figures["seconds_9"]) == (0.5, 3.5)
    assert (figures["paper_qd_same_1"], figures["paper_qd_same_9"]) == (0.01, 0.15)
    assert not {"qd_same_4", "qd_same_8"} & set(figures)


def test_the_worst_mean_is_by_magnitude() -> None:
    worse = dataclasses.replace(row(images=8), qd_unseen=-0.02, qd_remember=0.003)

    figures = summary([row(), worse], [], [], [])

    assert math.isclose(float(str(figures["qd_unseen_worst_mean"])), 0.02)
    assert math.isclose(float(str(figures["qd_remember_worst_mean"])), 0.003)


@pytest.mark.parametrize("nearest", [(math.nan, 0.001), (0.001, math.nan)])
def test_a_figure_that_is_not_there_is_null_and_never_the_best_of_the_others(nearest: tuple[float, float]) -> None:
    rows = [dataclasses.replace(row(images=size), qd_nearest=x) for size, x in zip((4, 8), nearest, strict=True)]

    figures = summary(rows, [{"name": "without L_R", "bpd": math.inf, "kid": math.nan, "met": False}], CURVE, CURVE)

    assert figures["qd_nearest_worst_mean"] is None
    assert figures["ablation"] == [{"name": "without L_R", "bpd": None, "kid": None, "met": False}]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_without_rows_the_line_is_json_still() -> None:
    figures = summary([], [], CURVE, CURVE[:1])

    assert (figures["runs"], figures["qd_remember_worst_mean"]) == (0, None)
    assert (figures["set_size"], figures["set_size_others"], figures["other_sets"]) == (CURVE, CURVE[:1], 1)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_every_ablation_is_one_that_the_method_knows_and_the_last_leaves_nothing_out() -> None:
    for without, _ in ABLATIONS.values():
        assert TamingParameters(engine="paper", without=without).without == without
    assert [without for without, _ in ABLATIONS.values()].count(()) == 1
