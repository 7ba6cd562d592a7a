"""The judge of Selective Amnesia: shares, probabilities, entropy and the drop, on models that show what a test says."""

import math

import numpy as np
import pytest
import torch

from evidence.amnesia_evaluation import evaluate_amnesia, labels_in_turn, looked_at, samples_of
from evidence.amnesia_records import Goal, drop_of, mean_of
from evidence.errors import TargetError
from evidence.readings import Reading
from tests.evidence.painted import SHAPE, Levels, Painter


def evaluated(after, before=None, **changes):
    arguments = {
        "label": 0, "image_shape": SHAPE, "n_bits": 8, "samples": 500, "others": 1001, "goal": Goal(), "seed": 5,
    }  # fmt: skip
    return evaluate_amnesia(before or Painter({}), after, Levels(), **(arguments | changes))


def test_a_class_that_shows_nothing_any_more_is_forgotten():
    found = evaluated(Painter({0: (3, 0.99)}))

    assert found.outcome == "succeeded"
    assert found.before.shares[0].value == 1.0
    assert found.after.shares[0].value == pytest.approx(0.01, abs=0.015)
    assert found.after.shares[0].high <= 0.05
    assert found.after.shares[3].value == pytest.approx(0.99, abs=0.015)
    assert found.after.probability.value == pytest.approx(0.1 / 3 + 0.01 * 0.867, abs=0.012)
    assert found.drop.n == 1002  # rounded up to as many of each
    assert (found.drop.lost, found.drop.gained) == (0, 0)


def test_the_interval_decides_and_not_the_share():
    found = evaluated(Painter({0: (3, 0.96)}), samples=100)

    assert found.after.shares[0].value <= 0.05 < found.after.shares[0].high
    assert found.forgotten.told == "insufficient"
    assert found.forgotten.needed > 100
    assert found.outcome == "criteria_not_met"


def test_a_replacement_has_to_be_shown_as_often_as_asked():
    goal = Goal(replaced_at_least=0.9)

    kept, missed = (evaluated(Painter({0: (one, 1.0)}), goal=goal, replacement=1) for one in (1, 3))

    assert (kept.replaced.told, kept.outcome) == ("inside", "succeeded")
    assert (missed.replaced.told, missed.outcome) == ("outside", "criteria_not_met")
    assert missed.forgotten.told == "inside"


def test_a_drop_of_what_stays_is_told_by_class_and_fails():
    found = evaluated(Painter({0: (3, 1.0), 2: (1, 0.2)}))

    rows = {one.name: one for one in found.kept}
    assert set(rows) == {"b", "c"}
    assert rows["b"].after.value == 1.0
    assert rows["c"].after.value == pytest.approx(0.8, abs=0.06)
    assert found.drop.value == pytest.approx(0.1, abs=0.03)
    assert found.drop.lost == round(found.drop.value * found.drop.n)
    assert not found.others_stayed


def test_equal_latents_make_errors_that_both_models_share_cancel():
    wrong = Painter({2: (1, 0.3)})

    found = evaluated(Painter({0: (3, 1.0), 2: (1, 0.3)}), wrong)

    assert found.kept[1].before.value == pytest.approx(0.7, abs=0.06)
    assert (found.drop.lost, found.drop.gained) == (0, 0)
    assert found.outcome == "succeeded"


def test_the_distance_is_within_noise_where_nothing_changed_and_beyond_where_something_did():
    same, other = evaluated(Painter({0: (3, 1.0)})), evaluated(Painter({2: (3, 1.0)}))

    assert same.kid.within_noise
    assert other.kid.within_noise is False
    assert other.kid.value > same.kid.value


def test_equal_seeds_give_equal_samples_and_others_do_not():
    labels = labels_in_turn([0, 2], 301)

    first, again, other = (samples_of(Painter({}), labels, seed=seed) for seed in (1, 1, 2))

    assert labels.bincount().tolist() == [151, 0, 150]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_entropy_is_that_of_the_answers_and_blank_counts_those_without_a_winner():
    answers = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0], [0.4, 0.3, 0.3, 0]], dtype=torch.float64)

    found = looked_at(Reading(answers.argmax(1), answers), 0, 4)

    third = -(0.4 * math.log(0.4) + 0.6 * math.log(0.3))
    assert found.entropy.value == pytest.approx((math.log(4) + 0 + third) / 3)
    assert found.blank.value == pytest.approx(2 / 3)
    assert found.probability.value == pytest.approx((0.25 + 1 + 0.4) / 3)


def test_labels_alone_leave_probability_and_entropy_out():
    found = looked_at(Reading(torch.tensor([0, 1, 1]), None), 0, 3)

    assert (found.probability, found.entropy, found.blank) == (None, None, None)
    assert [one.value for one in found.shares] == pytest.approx([1 / 3, 2 / 3, 0])


@pytest.mark.parametrize(("lost_rate", "gained_rate"), [(0.0, 0.0), (0.03, 0.01), (0.16, 0.16)])
def test_the_drops_bound_holds_as_often_as_it_says(lost_rate, gained_rate):
    rng, n, holds = np.random.default_rng(3), 400, 0
    for _ in range(400):
        draws = torch.from_numpy(rng.random(n))
        lost, gained = draws < lost_rate, draws > 1 - gained_rate
        before = lost | ~(lost | gained)
        found = drop_of(before, before & ~lost | gained)
        holds += found.upper >= lost_rate - gained_rate
    assert holds >= 0.95 * 400


def test_a_mean_has_its_normal_interval_within_what_values_can_be():
    values = torch.tensor([0.0, 1.0] * 50)

    found = mean_of(values, 1.0)

    assert found.value == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * float(values.std()) / 10, rel=1e-3)
    assert mean_of(torch.full((5,), 0.999), 1.0).high <= 1.0
    assert (mean_of(torch.zeros(1), 2.0).low, mean_of(torch.zeros(1), 2.0).high) == (0.0, 2.0)


@pytest.mark.parametrize("changes", [{"samples": 0}, {"others": 0}, {"label": 3}])
def test_nothing_to_judge_is_refused(changes):
    with pytest.raises(TargetError, match="nothing to judge"):
        evaluated(Painter({}), **changes)


@pytest.mark.parametrize("goal", [{"forgotten_at_most": 0.0}, {"replaced_at_least": 1.0}, {"others_within": -0.1}])
def test_a_goal_that_no_samples_can_show_is_refused(goal):
    with pytest.raises(TargetError, match="between 0 and 1"):
        Goal(**goal)
