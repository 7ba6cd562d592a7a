"""Bounds on fractions: what can be reached is aimed at, and what cannot is refused with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor

from unlearning import Constraint, UnreachableError
from unlearning.constraints import CLOSE, aims, check_reachable, count, project
from unlearning.reachability import FEWEST

N = 4096


def _bounded(
    bounds: Mapping[str, tuple[float, float]], classes: Sequence[str] = ("smile", "plain"), name: str = "mouth"
) -> Constraint:
    return Constraint(tuple(classes), lambda images: torch.zeros(len(images), dtype=torch.long), bounds, name)


def _shown(*hits: int) -> Tensor:
    """Labels of which each class has so many."""
    return torch.arange(len(hits)).repeat_interleave(torch.tensor(hits))


def _begun(constraints: Sequence[Constraint], labels: Sequence[Tensor]) -> list[Tensor]:
    """What `steer` does with the base's labels before its first step."""
    check_reachable(constraints, [count(*pair, 0.95) for pair in zip(constraints, labels, strict=True)])
    return aims(constraints, labels)


def _refused(constraints: Sequence[Constraint], labels: Sequence[Tensor]) -> UnreachableError:
    with pytest.raises(UnreachableError) as caught:
        _begun(constraints, labels)
    return caught.value


@pytest.mark.parametrize("others", range(FEWEST))
def test_a_class_cannot_be_lowered_where_the_base_hardly_shows_another(others: int) -> None:
    error = _refused([_bounded({"smile": (0.0, 0.5)})], [_shown(N - others, others)])

    assert (error.constraint, error.class_name) == ("mouth", "plain")
    assert (error.measured, error.n) == (others / N, N)
    assert others / N < (error.upper or 0) < 0.004
    assert f"plain would have to become more frequent, and the base shows that in {others} of {N}" in str(error)


def test_a_class_is_lowered_where_the_base_shows_just_enough_of_another() -> None:
    (log_weights,) = _begun([_bounded({"smile": (0.0, 0.5)})], [_shown(N - FEWEST, FEWEST)])

    after = (log_weights.exp() * torch.tensor([N - FEWEST, FEWEST]) / N).tolist()
    assert sum(after) == pytest.approx(1)
    assert after[0] <= 0.5


def test_rare_classes_without_bounds_are_taught_together() -> None:
    classes = [f"class {k}" for k in range(11)]
    constraint = _bounded({"class 0": (0.0, 0.5)}, classes)

    (log_weights,) = _begun([constraint], [_shown(N - 10, *[1] * 10)])

    assert log_weights[0] < 0 < log_weights[1]
    assert log_weights[1:].tolist() == pytest.approx([float(log_weights[1])] * 10)


def test_more_of_a_rare_class_is_refused_only_where_it_is_needed() -> None:
    classes, labels = ("a", "b", "c"), _shown(2047, 2047, 2)

    error = _refused([_bounded({"a": (0.0, 0.3), "b": (0.0, 0.6)}, classes)], [labels])
    (log_weights,) = _begun([_bounded({"a": (0.0, 0.3), "b": (0.0, 0.7)}, classes)], [labels])

    assert (error.class_name, error.measured) == ("c", 2 / N)
    assert float(log_weights[2]) < 1.5  # it moves along with b, and does not stand in for it


def test_judges_that_agree_on_all_samples_cannot_be_pulled_apart() -> None:
    wanted = [_bounded({"smile": (0.0, 0.2)}), _bounded({"yes": (0.5, 1.0)}, ("yes", "no"), "smiling")]

    error = _refused(wanted, [_shown(N // 2, N // 2)] * 2)

    assert (error.constraint, error.class_name) == (None, "plain and yes")
    assert (error.measured, error.n) == (0.0, N)


def test_what_one_of_two_judges_asks_in_vain_is_said_of_that_one() -> None:
    wanted = [_bounded({"smile": (0.0, 0.9)}), _bounded({"smile": (0.0, 0.5)}, name="mouth (2)")]

    error = _refused(wanted, [_shown(N // 2, N // 2), _shown(N - 1, 1)])

    assert (error.constraint, error.class_name, error.measured) == ("mouth (2)", "plain", 1 / N)


def test_two_judges_are_not_held_to_a_combination_that_need_not_grow() -> None:
    labels = [_shown(N // 2, N // 2), torch.cat([_shown(N // 2 - 2, 2), _shown(N // 4, N // 4)])]

    _begun([_bounded({"smile": (0.0, 0.3)}), _bounded({"yes": (0.0, 0.5)}, ("yes", "no"), "eyes")], labels)


@pytest.mark.parametrize(
    ("bounds", "named"),
    [({"smile": (0.6, 1.0), "plain": (0.5, 1.0)}, "plain"), ({"smile": (0.0, 0.3), "plain": (0.0, 0.3)}, "smile")],
)
def test_bounds_that_contradict_each_other_are_refused_with_what_was_measured(
    bounds: dict[str, tuple[float, float]], named: str
) -> None:
    error = _refused([_bounded(bounds)], [_shown(3 * N // 4, N // 4)])

    assert (error.constraint, error.class_name, error.n) == ("mouth", named, N)
    assert error.measured == {"smile": 0.75, "plain": 0.25}[named]
    assert f"{named} in {error.measured:.2%} of {N} samples" in str(error)


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (0.2, 0.5)])
def test_a_projection_whose_sum_is_not_1_misses(bounds: tuple[float, float]) -> None:
    box = torch.tensor([[bounds[0], 0.0], [bounds[1], 1.0]], dtype=torch.float64)

    _, miss = project([_shown(N, 0)], [(box[0], box[1])])

    assert miss == pytest.approx(0.5)


def test_a_projection_that_keeps_its_bounds_sums_to_1() -> None:
    boxes = [torch.tensor([[0.0, 0.0], [0.3, 1.0]]).double(), torch.tensor([[0.0, 0.6], [1.0, 1.0]]).double()]
    labels = [_shown(6, 4), torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1])]

    weights, miss = project(labels, [(box[0], box[1]) for box in boxes])

    mass = (weights[0][labels[0]] * weights[1][labels[1]]).mean()
    assert miss <= CLOSE
    assert float(mass) == pytest.approx(1)
