"""The benchmark of taming: what its figures are made of, and what part of a gain it calls waste, without a run."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable

import pytest
import torch

from benchmarks.counting import CACHING, EVALUATING, SETTLING, STEPS, CountedGlow, Spent, Tally, without_waste
from benchmarks.orl_judge import Verdict
from benchmarks.taming import Clock, Run, summary
from models.glow import Glow
from unlearning import State, Step

AS_BEFORE = {
    "people", "confirmed", "median_seconds", "median_cpu_seconds", "median_steps", "z_min_worst", "qd_forget_mean",
    "qd_held_out_mean", "qd_remember_median", "qd_remember_worst", "qd_unseen_median", "qd_unseen_worst",
    "drift_median", "speedup", "speedup_is_lower_bound", "paper_people", "paper_confirmed",
    "drift_median_same_people", "paper_drift_median", "drift_ratio",
}  # fmt: skip
VERDICT = Verdict(
    confirmed=True, z_min=3.6, q_forget=1e-4, qd_forget=0.5, qd_same=0.3, qd_remember=-0.001, qd_unseen=0.01,
    qd_nearest=math.nan, drift=0.1,
)  # fmt: skip
OURS = Run(
    seconds=5.0, cpu_seconds=9.0, steps=20, met=True, verdict=VERDICT,
    spent=Spent({CACHING: 2.0, SETTLING: 0.5, EVALUATING: 1.0, STEPS: 1.5}, {EVALUATING: 400, STEPS: 2000}),
    needed=20, confirmation=400,
)  # fmt: skip
PAPER = Run(
    seconds=60.0, cpu_seconds=110.0, steps=200, met=True, verdict=dataclasses.replace(VERDICT, drift=0.4),
    spent=Spent({EVALUATING: 20.0, STEPS: 40.0}, {EVALUATING: 8000, STEPS: 2600}), needed=150, confirmation=400,
)  # fmt: skip


def unconfirmed(run: Run) -> Run:
    """A run that stopped by itself, and that the judge turned down."""
    return dataclasses.replace(run, verdict=dataclasses.replace(run.verdict, confirmed=False))


def unmet(run: Run) -> Run:
    """A run that was cut off, though the judge might let it pass."""
    return dataclasses.replace(run, met=False)


def flow() -> CountedGlow:
    """A tiny flow, counted."""
    generator = torch.Generator().manual_seed(0)
    return CountedGlow.of(Glow((1, 4, 4), 5, n_block=2, n_flow=1, hidden=4, generator=generator))


def test_the_keys_are_as_before_and_the_line_is_json() -> None:
    figures = summary({1: OURS, 2: OURS}, {1: PAPER})

    assert set(figures) > AS_BEFORE
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_without_the_recipe_there_is_no_ratio_and_the_keys_are_the_same() -> None:
    figures = summary({1: OURS}, {})

    assert set(figures) == set(summary({1: OURS}, {1: PAPER}))
    for name in ("speedup", "drift_ratio", "gain_removed_waste", "gain_method"):
        assert figures[name] is None
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize(("seconds", "drift", "speedup", "ratio"), [(5.0, 0.1, 12, 0.25), (120.0, 0.8, 0.5, 2.0)])
def test_a_speedup_above_1_and_a_drift_ratio_below_1_are_ours(
    seconds: float, drift: float, speedup: float, ratio: float
) -> None:
    ours = dataclasses.replace(OURS, seconds=seconds, verdict=dataclasses.replace(VERDICT, drift=drift))

    figures = summary({1: ours}, {1: PAPER})

    assert (figures["speedup"], figures["drift_ratio"]) == (speedup, ratio)


@pytest.mark.parametrize("missed", [unconfirmed, unmet])
def test_a_person_whom_either_engine_missed_is_not_counted_as_confirmed(missed: Callable[[Run], Run]) -> None:
    figures = summary({1: OURS, 2: missed(OURS), 3: OURS}, {1: PAPER, 2: missed(PAPER)})

    assert (figures["people"], figures["confirmed"]) == (3, 2)
    assert (figures["paper_people"], figures["paper_confirmed"]) == (2, 1)
    assert figures["confirmed_same_people"] == 1
    assert figures["speedup_is_lower_bound"] is True


def test_a_recipe_that_always_came_to_its_confirmed_stop_gives_no_lower_bound() -> None:
    assert summary({1: OURS, 2: OURS}, {1: PAPER, 2: PAPER})["speedup_is_lower_bound"] is False


def test_only_the_people_of_both_engines_are_compared_and_the_worst_is_by_magnitude() -> None:
    other = dataclasses.replace(
        OURS, seconds=1.0, verdict=dataclasses.replace(VERDICT, drift=9.0, qd_unseen=-0.2, z_min=3.5)
    )

    figures = summary({1: OURS, 2: other}, {1: PAPER})

    assert (figures["speedup"], figures["drift_median_same_people"]) == (12, 0.1)
    assert (figures["median_seconds"], figures["qd_unseen_worst"], figures["z_min_worst"]) == (3.0, 0.2, 3.5)
    assert figures["images_by_part"] == {"fast": OURS.spent.images, "paper": PAPER.spent.images}


def test_waste_is_passes_without_a_gradient_but_one_confirmation_and_steps_past_the_criterion() -> None:
    assert without_waste(PAPER.spent, steps=200, needed=150, confirmation=400) == 40 * 150 / 200 + 20 * 400 / 8000
    assert without_waste(PAPER.spent, steps=200, needed=200, confirmation=8000) == PAPER.seconds
    assert without_waste(Spent({STEPS: 4.0}, {STEPS: 10}), steps=0, needed=0, confirmation=400) == 0


def test_the_factors_of_the_gain_multiply_to_it() -> None:
    figures = summary({1: OURS}, {1: PAPER})
    removed, method, steps, price = (
        figures[f"gain_{name}"] for name in ("removed_waste", "method", "fewer_steps", "price_of_a_step")
    )

    assert isinstance(removed, float)
    assert isinstance(method, float)
    assert isinstance(steps, float)
    assert isinstance(price, float)
    assert math.isclose(removed, 60 / 31)
    assert math.isclose(steps, 150 / 20)
    assert math.isclose(removed * method, 12)
    assert math.isclose(steps * price, method)


def test_passes_are_counted_once_and_by_what_they_are_for() -> None:
    counted, x = flow(), torch.zeros(3, 1, 4, 4)
    tamed = copy.deepcopy(counted)  # as `tame` does: both note in one place

    with torch.no_grad():
        h, _ = tamed.prefix(x)
        tamed.suffix_log_prob(h)
        counted.log_prob(x[:2])
    tamed.suffix_log_prob(h)
    with torch.no_grad():
        tamed.suffix_log_prob(h[:1])
    spent = counted.tally.spent()

    assert spent.images == {CACHING: 6, EVALUATING: 2, STEPS: 3, SETTLING: 1}
    assert set(spent.seconds) == set(spent.images)
    assert all(seconds > 0 for seconds in spent.seconds.values())


def test_a_counted_flow_gives_the_bits_of_the_one_it_was_made_of() -> None:
    base = Glow((1, 4, 4), 5, n_block=2, n_flow=1, hidden=4, generator=torch.Generator().manual_seed(0))
    x = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5

    assert torch.equal(CountedGlow.of(base).log_prob(x), base.log_prob(x))


def test_a_pass_that_fails_leaves_the_tally_open_for_the_next() -> None:
    tally = Tally()

    with pytest.raises(ZeroDivisionError), tally.note(torch.zeros(1), whole=True):
        _ = 1 / 0
    with torch.no_grad(), tally.note(torch.zeros(2), whole=True):
        pass

    assert tally.spent().images == {EVALUATING: 2}


def test_the_clock_knows_the_first_step_that_was_far_enough() -> None:
    clock = Clock(3600.0, bound=3.4)

    for step, z in enumerate((1.0, 3.5, 2.0, 3.9), start=1):
        clock(Step("unlearning", step, 10, {}, {"z_min": z}, lambda: State({}, {})))

    assert (clock.steps, clock.passed) == (4, 2)
