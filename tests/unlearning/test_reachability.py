"""What a base can teach: enough samples of what has to grow, however other judges sort them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from unlearning import Constraint
from unlearning.constraints import CLOSE, aims, project
from unlearning.reachability import FEWEST, Box, Group, untaught

N = 4096
ANY = (0.0, 1.0)


def _sorted(*cells: tuple[int, Sequence[int]]) -> list[Tensor]:
    """Labels of samples, for each cell so many that every judge puts in these classes: one (n,) a judge."""
    rows = torch.cat([torch.tensor([list(classes)]).repeat(hits, 1) for hits, classes in cells])
    return list(rows.unbind(1))


def _box(*bounds: tuple[float, float]) -> Box:
    low, high = torch.tensor(bounds, dtype=torch.float64).unbind(1)
    return low, high


def _marginals(labels: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    mass = torch.stack([weight[label] for weight, label in zip(weights, labels, strict=True)]).prod(0) / len(labels[0])
    return [torch.zeros_like(weight).index_add_(0, label, mass) for weight, label in zip(weights, labels, strict=True)]


@pytest.mark.parametrize("of_one", range(FEWEST))
def test_bounds_that_hold_already_do_not_split_a_rare_class(of_one: int) -> None:
    many = (N - FEWEST) // 2
    labels = _sorted((many, (0, 0)), (many + 1, (0, 1)), (of_one, (1, 0)), (FEWEST - of_one, (1, 1)))
    boxes = [_box((0.0, 0.5), ANY), _box((0.2, 0.8), ANY)]

    weights, miss = project(labels, boxes)

    assert untaught(labels, boxes) == []
    assert miss <= CLOSE
    plain, sorted_otherwise = (float(after[1]) for after in _marginals(labels, weights))
    assert plain == pytest.approx(0.5)
    assert 0.2 - CLOSE <= sorted_otherwise <= 0.8 + CLOSE


def test_a_request_that_one_judge_grants_is_granted_beside_slack_bounds_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    rare = torch.arange(N) < FEWEST + 2
    others = [torch.randint(3, (N,), generator=generator) for _ in range(4)]
    wanted = [Constraint(("a", "b"), _unasked, {"a": (0.0, 0.3)}, "rare")]
    wanted += [Constraint(("x", "y", "z"), _unasked, {"x": (0.0, 0.8), "y": (0.0, 0.8)}, f"{j}") for j in range(4)]

    (alone,) = aims(wanted[:1], [rare.long()])
    (beside, *slack) = aims(wanted, [rare.long(), *others])

    assert beside.tolist() == pytest.approx(alone.tolist(), abs=1e-6)
    assert all(float(weight.abs().max()) < 1e-6 for weight in slack)


def test_what_two_judges_tell_together_is_not_split_by_a_third() -> None:
    few = 2 * (FEWEST - 2)  # enough together, and too few of either class of the third
    labels = _sorted(
        *((N // 4, (one, 1 - one, third)) for one in (0, 1) for third in (0, 1)),
        *((few // 2, (1, 1, third)) for third in (0, 1)),
    )
    joint, slack = [_box(ANY, (0.6, 1.0)), _box(ANY, (0.6, 1.0))], _box((0.2, 0.8), ANY)

    assert untaught(labels[:2], joint) == []
    assert untaught(labels, [*joint, slack]) == []


@pytest.mark.parametrize("both", range(FEWEST))
def test_frequent_classes_that_must_meet_in_a_rare_cell_are_refused(both: int) -> None:
    labels = _sorted((N // 2, (0, 1)), (N // 2 - both, (1, 0)), (both, (1, 1)))

    short = untaught(labels, [_box((0.0, 0.2), ANY), _box(ANY, (0.7, 1.0))])

    assert short == [Group(((1,), (1,)), both)]


def test_a_rare_cell_grows_no_further_than_in_its_proportion() -> None:
    labels = _sorted((N // 2, (0, 0)), (N // 2, (0, 1)), (3, (1, 0)), (4, (1, 1)))
    mostly = _box((0.0, 0.1), ANY)  # .9 of the rare class, of which 3 in 7 are to be expected

    assert untaught(labels, [mostly, _box((0.4, 1.0), ANY)]) == []
    assert untaught(labels, [mostly, _box((0.7, 1.0), ANY)]) == [Group(((1,), (0,)), 3)]


def test_a_rare_class_is_refused_however_frequent_its_company() -> None:
    labels = _sorted((N // 2, (0, 0)), (N // 2, (0, 1)), (FEWEST - 1, (1, 1)))

    short = untaught(labels, [_box(ANY, (0.2, 1.0)), _box((0.2, 0.8), ANY)])

    assert {group.classes[0] for group in short} == {(1,)}


def test_rare_combinations_of_sixteen_judges_are_not_held_against_them() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = [(torch.rand(N, generator=generator) < 0.3).long() for _ in range(16)]

    assert untaught(labels, [_box((0.0, 0.6), ANY)] * 16) == []


def _unasked(images: Tensor) -> Tensor:
    raise AssertionError(f"{len(images)} images were judged: labels are given here")
