"""The judge of a balanced condition: shares against their target, and what the others mostly show."""

import pytest
import torch

from evidence.balance_evaluation import change_of, evaluate_balance
from evidence.errors import TargetError
from evidence.fractions import Bound
from tests.evidence.painted import SHAPE, Levels, Painter

NAMES = ("a doctor", "a nurse", "a pilot")
BOUNDS = {
    "a": Bound.around(0.0, 0.1), "b": Bound.around(0.5, 0.1), "c": Bound.around(0.5, 0.1), "nothing": Bound(0.0, 0.1),
}  # fmt: skip


class Spread(Painter):
    """Of the first condition, "b" for some of the latents and "c" for the rest."""

    def __init__(self, share, instead=None):
        super().__init__(instead or {})
        self.share = share

    def sample(self, condition, *, generator):
        if bool((condition == 0).all()):
            turned = torch.rand(len(condition), generator=generator) < self.share
            condition = torch.where(turned, 1, 2)
        return super().sample(condition, generator=generator)


def evaluated(after, before=None, **changes):
    arguments = {
        "label": 0, "names": NAMES, "bounds": BOUNDS, "image_shape": SHAPE, "n_bits": 8, "samples": 1000,
        "others": 1001, "seed": 5,
    }  # fmt: skip
    return evaluate_balance(before or Painter({}), after, Levels(), **(arguments | changes))


def test_a_condition_that_shows_both_evenly_is_balanced():
    found = evaluated(Spread(0.5))

    assert found.outcome == "succeeded"
    assert found.before["a"].value == 1.0
    assert found.after["b"].value == pytest.approx(0.5, abs=0.06)
    assert found.after["b"].value + found.after["c"].value == 1.0
    assert {name: found.told(name).told for name in BOUNDS} == dict.fromkeys(BOUNDS, "inside")
    assert found.drop.n == 1002  # rounded up to as many of each
    assert found.summary()["after/levels/b"] == found.after["b"].value


@pytest.mark.parametrize(("share", "samples", "told"), [(0.7, 1000, "outside"), (0.5, 100, "insufficient")])
def test_the_interval_decides_and_not_the_share(share, samples, told):
    found = evaluated(Spread(share), samples=samples)

    assert found.balanced.told == told
    assert found.outcome == "criteria_not_met"


def test_intervals_of_all_classes_hold_together():
    found = evaluated(Spread(0.5))

    assert found.after["b"].level == pytest.approx(1 - 0.05 / 4)


def test_a_balance_that_spreads_to_others_fails_and_says_where():
    found = evaluated(Spread(0.5, {2: (1, 0.3)}))

    assert found.usual == ("b", "c")
    assert [one.name for one in found.kept] == ["a nurse", "a pilot"]
    assert found.kept[0].after.value == 1.0
    assert found.kept[1].after.value == pytest.approx(0.7, abs=0.07)
    assert found.read_otherwise.value == pytest.approx(0.15, abs=0.04)
    assert not found.others_stayed
    assert found.outcome == "criteria_not_met"


def test_others_that_become_more_alike_than_they_were_fail_too():
    found = evaluated(Spread(0.5), Painter({2: (1, 0.3)}))

    assert found.usual == ("b", "c")
    assert found.drop.value == pytest.approx(-0.15, abs=0.04)
    assert found.drop.upper > 0.15 - 0.04
    assert not found.others_stayed


def test_what_others_show_is_held_against_the_base_and_not_against_their_names():
    swapped = {1: (2, 1.0), 2: (1, 1.0)}

    found = evaluated(Spread(0.5, swapped), Painter(swapped))

    assert found.usual == ("c", "b")
    assert (found.drop.lost, found.drop.gained, found.read_otherwise.value) == (0, 0, 0.0)
    assert found.outcome == "succeeded"


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (30, 5), (5, 30), (40, 40)])
def test_a_change_is_bounded_whichever_way_it_goes(lost, gained):
    before = torch.arange(1000) < 500
    after = before.clone()
    after[:lost], after[500 : 500 + gained] = False, True

    found, mirrored = change_of(before, after), change_of(after, before)

    assert (found.lost, found.gained) == (lost, gained)
    assert found.value == (lost - gained) / 1000 == -mirrored.value
    assert found.upper == mirrored.upper > abs(found.value)


@pytest.mark.parametrize("changes", [{"samples": 0}, {"others": 0}, {"label": 3}, {"bounds": {}}])
def test_nothing_to_judge_is_refused(changes):
    with pytest.raises(TargetError, match="nothing to judge"):
        evaluated(Painter({}), **changes)


@pytest.mark.parametrize("within", [0.0, 1.0])
def test_what_no_samples_can_show_is_refused(within):
    with pytest.raises(TargetError, match="between 0 and 1"):
        evaluated(Painter({}), others_within=within)
