"""How many samples a job judges: enough for whatever the door lets in, and a refusal with the number beyond that."""

from __future__ import annotations

import pytest

from evidence.fractions import Bound, samples_to_pass
from unlearning import Constraint, ParameterError
from unlearning.constraints import MOST_SAMPLES, samples_needed
from worker.runner.problems import UserError
from worker.runner.samples import LEAST_SAMPLES, samples_around, samples_below

TIGHTEST = {"tolerance": 0.01, "at_most": 0.001, "at_least": 0.999}  # that the door lets in
SUREST = 0.9999  # likewise


def bounded(low: float, high: float, classes: int) -> Constraint:
    names = tuple(f"c{k}" for k in range(classes))
    return Constraint(names, lambda images: images[:, 0, 0, 0].long(), {"c0": (low, high)})


@pytest.mark.parametrize("classes", [2, 100])
@pytest.mark.parametrize("confidence", [0.5, 0.95, SUREST])
def test_whatever_the_door_lets_in_gets_samples_that_decide_it(classes: int, confidence: float) -> None:
    rare, near = TIGHTEST["at_most"], TIGHTEST["tolerance"]
    level = 1 - (1 - confidence) / (1 if classes == 2 else classes)

    for low, high, aim in ((0.0, rare, rare / 2), (1 - rare, 1.0, 1 - rare / 2), (0.5 - near, 0.5 + near, 0.5)):
        asked = samples_needed([bounded(low, high, classes)], confidence)

        sufficient = samples_to_pass(aim, Bound(low, high), level=level)
        assert sufficient is not None
        assert sufficient <= asked <= MOST_SAMPLES


def test_a_tolerance_of_the_door_never_asks_for_too_many() -> None:
    assert samples_around([0.5, 0.5], 0.01, SUREST) <= MOST_SAMPLES
    assert samples_around([0.5, *[0.5 / 99] * 99], 0.01, SUREST) <= MOST_SAMPLES
    assert samples_around([0.5, 0.5], 0.5, 0.5) == LEAST_SAMPLES


@pytest.mark.parametrize(
    ("tolerance", "number"), [(0.0005, r"24,\d{3},\d{3} samples"), (1e-6, "more than 134,217,728")]
)
def test_a_tolerance_beyond_all_means_is_refused_with_what_it_would_take(tolerance: float, number: str) -> None:
    with pytest.raises(UserError, match=number) as refused:
        samples_around([0.5, 0.5], tolerance, 0.95)

    assert refused.value.problem["errors"][0]["pointer"] == "/tolerance"


def test_a_rate_too_near_its_bound_is_refused() -> None:
    with pytest.raises(UserError, match="and 524,288 are the most") as refused:
        samples_below(0.2999, Bound(0.0, 0.3), confidence=0.95, classes=2)

    assert refused.value.problem["type"].endswith("insufficient-evidence")
    assert samples_below(0.25, Bound(0.0, 0.3), confidence=0.95, classes=2) < 2000


def test_the_library_refuses_bounds_beyond_all_means_by_the_class() -> None:
    with pytest.raises(ParameterError, match=r"c0: insufficient evidence: .* takes 23,\d{3},\d{3} samples"):
        samples_needed([bounded(0.4995, 0.5005, 2)], 0.95)
