"""Steering: fractions reach their bounds on fresh samples, the rest stays, and what cannot be is said first."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.glow import Glow
from models.protocol import Flow
from tests.unlearning.tiny import N_BITS, DiagonalGaussian, blobs, trained_flow
from unlearning import (
    Constraint,
    InputError,
    Interrupted,
    ParameterError,
    State,
    StateError,
    SteeringParameters,
    SteeringResult,
    Step,
    UnreachableError,
    measure_fractions,
    steer,
)
from unlearning.constraints import aims, project, samples_needed
from unlearning.likelihood import nll_of
from unlearning.randomness import stream

QUICK = SteeringParameters(max_steps=200, pool=512, learning_rate=2e-3, samples=1500, probe=250)
SHORT = SteeringParameters(max_steps=12, pool=128, samples=100, probe=50, measure_every=4)
TOLERANCE = 0.05
FRESH = 99
"""A seed that no run of this file draws from."""


def is_right(images: Tensor) -> Tensor:
    """Whether a blob lies in the right half."""
    half = images.shape[-1] // 2
    return (images[..., half:].float().mean((1, 2, 3)) > images[..., :half].float().mean((1, 2, 3))).long()


def is_bright(images: Tensor) -> Tensor:
    """Whether an image is light on the whole."""
    return (images.float().mean((1, 2, 3)) > 95).long()


def side(bounds: Mapping[str, tuple[float, float]]) -> Constraint:
    return Constraint(("left", "right"), is_right, bounds, "side")


def light(bounds: Mapping[str, tuple[float, float]]) -> Constraint:
    return Constraint(("dark", "bright"), is_bright, bounds, "light")


def sampled(flow: object, constraint: Constraint, n: int = 2000) -> dict[str, float]:
    """Fractions of fresh samples."""
    return measure_fractions(cast(Flow, flow), [constraint], n, N_BITS, FRESH)[0].values


class StopAfter:
    """A callback that takes a snapshot at one boundary, by way of a file, and interrupts."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def __call__(self, step: Step) -> None:
        if step.step == self.step:
            step.snapshot().save(self.path)
            raise Interrupted


@pytest.fixture(scope="module")
def base() -> Glow:
    """A flow trained on blobs, about half of them left, a fifth dark; never modified by a test."""
    return trained_flow()


@pytest.fixture(scope="module")
def steered(base: Glow) -> SteeringResult:
    """Left blobs brought down from a half to a quarter."""
    target = Constraint.towards(("left", "right"), is_right, {"left": 0.25, "right": 0.75}, TOLERANCE, "side")
    return steer(base, [target], QUICK, n_bits=N_BITS, seed=1)


def test_fresh_samples_lie_inside_the_bounds(steered: SteeringResult) -> None:
    assert steered.met
    assert steered.before[0].values["left"] > 0.4

    assert sampled(steered.flow, side({}))["left"] == pytest.approx(0.25, abs=TOLERANCE)


def test_the_verdict_is_an_interval_inside_the_bounds(steered: SteeringResult) -> None:
    interval = steered.fractions[0].intervals["left"]

    assert 0.25 - TOLERANCE <= interval.low < interval.value < interval.high <= 0.25 + TOLERANCE
    assert steered.fractions[0].n == QUICK.samples


def test_another_attribute_keeps_its_fraction(base: Glow, steered: SteeringResult) -> None:
    before, after = sampled(base, light({})), sampled(steered.flow, light({}))

    assert after["dark"] == pytest.approx(before["dark"], abs=0.05)  # two draws of 2,000 differ by .03 at times


def test_every_image_becomes_as_likely_as_its_class(base: Glow, steered: SteeringResult) -> None:
    images = blobs(400, 31)
    nll = [nll_of(cast(Flow, f), images, n_bits=N_BITS, generator=stream(0, "x")) for f in (base, steered.flow)]
    gain, right = nll[0] - nll[1], is_right(images).bool()

    share = steered.before[0].values["right"]
    wanted = torch.tensor([0.25 / (1 - share), 0.75 / share]).log()
    assert float(gain[right].mean() - gain[~right].mean()) == pytest.approx(float(wanted[1] - wanted[0]), abs=0.7)
    assert float(gain.std()) < 0.3 * float(nll[0].std())


def test_the_base_is_not_modified(base: Glow) -> None:
    before = copy.deepcopy(base.state_dict())

    steer(base, [side({"left": (0.0, 0.1)})], SHORT, n_bits=N_BITS, seed=0)

    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_the_curve_of_a_fraction_starts_at_the_base_and_ends_at_the_verdict(steered: SteeringResult) -> None:
    curve = [row for row in steered.history if "n" in row]

    assert [row["step"] for row in curve] == list(range(0, steered.steps + 1, QUICK.measure_every))
    assert curve[0]["side.left"] == steered.before[0].values["left"]
    assert curve[-1]["side.left"] == steered.fractions[0].values["left"]
    assert curve[-1]["n"] == steered.fractions[0].n


@pytest.mark.parametrize("highest", [0.4, 0.3])
def test_a_run_stops_at_the_fraction_that_was_asked_for(base: Glow, highest: float) -> None:
    result = steer(base, [side({"left": (0.0, highest)})], QUICK, n_bits=N_BITS, seed=2)

    assert result.met
    assert highest - 0.1 < sampled(result.flow, side({}))["left"] <= highest


def test_two_attributes_are_steered_at_once(base: Glow) -> None:
    wanted = [side({"left": (0.65, 0.75)}), light({"dark": (0.35, 0.45)})]

    result = steer(base, wanted, QUICK, n_bits=N_BITS, seed=3)

    assert result.met
    assert 0.65 <= sampled(result.flow, wanted[0])["left"] <= 0.75
    assert 0.35 <= sampled(result.flow, wanted[1])["dark"] <= 0.45


def test_a_base_within_its_bounds_is_left_alone(base: Glow) -> None:
    result = steer(base, [side({"left": (0.3, 0.7)})], QUICK, n_bits=N_BITS, seed=0)

    assert (result.met, result.steps) == (True, 0)
    assert all(torch.equal(value, result.flow.state_dict()[name]) for name, value in base.state_dict().items())


def is_left(images: Tensor) -> Tensor:
    """The other answer."""
    return 1 - is_right(images)


@pytest.mark.parametrize(
    ("wanted", "seed"),
    [
        (side({"left": (0.0, 0.2)}), 4),
        (side({"left": (0.0, 0.3)}), 3),
        (Constraint(("left", "right"), is_left, {"left": (0.0, 0.2)}, "side"), 3),
    ],
)
def test_a_state_of_another_run_is_refused(base: Glow, tmp_path: Path, wanted: Constraint, seed: int) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        steer(base, [side({"left": (0.0, 0.2)})], SHORT, n_bits=N_BITS, seed=3, callback=StopAfter(1, path))

    with pytest.raises(StateError, match="belongs to a run"):
        steer(base, [wanted], SHORT, n_bits=N_BITS, seed=seed, state=State.load(path))


def is_striped(images: Tensor) -> Tensor:
    """What no blob is."""
    return (images[..., ::2].float().mean((1, 2, 3)) > images[..., 1::2].float().mean((1, 2, 3)) + 100).long()


def test_a_class_that_the_base_never_shows_is_refused_before_the_first_step(base: Glow) -> None:
    wanted = Constraint(("plain", "striped"), is_striped, {"striped": (0.2, 0.4)})

    with pytest.raises(UnreachableError, match="striped") as caught:
        steer(base, [wanted], SHORT, n_bits=N_BITS, seed=0, callback=lambda step: pytest.fail(f"{step} was taken"))

    assert (caught.value.class_name, caught.value.measured, caught.value.n) == ("striped", 0.0, SHORT.pool)
    assert 0 < (caught.value.upper or 0) < 0.05


@pytest.mark.parametrize(
    "wanted",
    [
        [side({"left": (0.6, 1.0), "right": (0.5, 1.0)})],
        [side({"left": (0.0, 0.3), "right": (0.0, 0.3)})],
        [side({"left": (0.0, 0.2)}), Constraint(("a", "b"), is_right, {"a": (0.4, 1.0)}, "the same")],
    ],
)
def test_bounds_that_contradict_each_other_are_refused(base: Glow, wanted: list[Constraint]) -> None:
    with pytest.raises(UnreachableError):
        steer(base, wanted, SHORT, n_bits=N_BITS, seed=0)


def test_bounds_out_of_reach_are_not_met(base: Glow) -> None:
    values = SteeringParameters(max_steps=1, pool=128, samples=100, probe=50)

    result = steer(base, [side({"left": (0.0, 0.05)})], values, n_bits=N_BITS, seed=0)

    assert (result.met, result.steps) == (False, 1)


def test_real_images_join_the_samples(base: Glow) -> None:
    wanted = [side({"left": (0.0, 0.2)})]

    alone = steer(base, wanted, SHORT, n_bits=N_BITS, seed=0)
    joined = steer(base, wanted, SHORT, n_bits=N_BITS, seed=0, remember=blobs(32, 5))

    assert joined.before == alone.before  # only the base's own samples tell its fractions
    assert [row.get("loss") for row in joined.history] != [row.get("loss") for row in alone.history]


def test_a_foreign_flow_can_be_steered() -> None:
    flow = DiagonalGaussian()

    result = steer(cast(Flow, flow), [side({"left": (0.0, 0.3)})], QUICK, n_bits=N_BITS, seed=0)

    assert result.met
    assert sampled(result.flow, side({}))["left"] <= 0.3


def test_memory_is_no_part_of_the_method(base: Glow, tmp_path: Path) -> None:
    wanted, path = [side({"left": (0.0, 0.2)})], tmp_path / "state.safetensors"
    whole = steer(base, wanted, SHORT, n_bits=N_BITS, seed=0, micro_batch=128)

    with pytest.raises(Interrupted):
        steer(base, wanted, SHORT, n_bits=N_BITS, seed=0, micro_batch=128, callback=StopAfter(5, path))
    again = steer(base, wanted, SHORT, n_bits=N_BITS, seed=0, micro_batch=7, state=State.load(path))

    assert again.history[5]["loss"] == whole.history[5]["loss"]  # of the state: it was not begun anew
    assert again.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-3)


class Weights:
    """A callback that keeps the log weights of the classes at every boundary."""

    def __init__(self) -> None:
        self.after: dict[int, Tensor] = {}

    def __call__(self, step: Step) -> None:
        self.after[step.step] = step.snapshot().tensors["class_weights"]


@pytest.mark.parametrize(("tolerance", "n"), [(0.05, 50), (0.249, 100)])
def test_a_measurement_corrects_the_weights_once(base: Glow, tolerance: float, n: int) -> None:
    # The narrow bounds are far away; the wide ones call for a check at every other look, and 100 samples fail it.
    wanted = Constraint.towards(("left", "right"), is_right, {"left": 0.25, "right": 0.75}, tolerance, "side")
    weights = Weights()

    result = steer(base, [wanted], SHORT, n_bits=N_BITS, seed=0, callback=weights)

    for step in (4, 8):
        row = result.history[step]
        now = torch.tensor([row["side.left"], row["side.right"]], dtype=torch.float64)
        error = (torch.tensor([0.25, 0.75], dtype=torch.float64) / now).log()
        chance = (1 - now) / (row["n"] * now)
        torch.testing.assert_close(
            weights.after[step] - weights.after[step - 1],
            SHORT.gain * error * error.square() / (error.square() + chance),
        )
    assert n in {result.history[step]["n"] for step in (4, 8)}


@pytest.mark.parametrize(
    "answer",
    [
        lambda images: torch.rand(len(images)),
        lambda images: torch.zeros(3, dtype=torch.long),
        lambda i: is_right(i) + 1,
    ],
)
def test_a_judge_that_answers_no_class_is_refused(base: Glow, answer: Any) -> None:
    wanted = Constraint(("left", "right"), answer, {"left": (0.0, 0.2)})

    with pytest.raises(InputError, match="judge"):
        steer(base, [wanted], SHORT, n_bits=N_BITS, seed=0)


@pytest.mark.parametrize("bounds", [{"up": (0.0, 0.5)}, {"left": (0.5, 0.4)}, {"left": (0.5, 0.5)}, {"left": (0, 1.5)}])
def test_wrong_bounds_are_refused(bounds: dict[str, tuple[float, float]]) -> None:
    with pytest.raises(ParameterError):
        side(bounds)


@pytest.mark.parametrize(
    "target", [{"left": 0.5, "right": 0.6}, {"left": 0.2, "right": 0.2}, {"left": -0.1}, {"up": 1}]
)
def test_a_target_that_is_no_distribution_is_refused(target: dict[str, float]) -> None:
    with pytest.raises(ParameterError):
        Constraint.towards(("left", "right"), is_right, target)


@pytest.mark.parametrize(
    ("values", "name"),
    [({"setps": 4}, "setps"), ({"probe": 4}, "probe"), ({"gain": float("nan")}, "gain"), ({"pool": 99.5}, "pool")],
)
def test_a_wrong_parameter_is_named(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError) as caught:
        SteeringParameters.from_dict(values)

    assert caught.value.name == name


def test_parameters_survive_the_wire() -> None:
    assert SteeringParameters.from_dict(json.loads(json.dumps(QUICK.to_dict()))) == QUICK


def test_the_projection_is_the_nearest_distribution_within_the_bounds() -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2])  # fractions .5, .3, .2
    low, high = torch.tensor([0.0, 0.0, 0.4]).double(), torch.tensor([0.45, 1.0, 1.0]).double()

    weights, miss = project([labels], [(low, high)])

    # .4 for the last by its bound, and .6 shared by the others as before: 5 to 3, so that .45 binds neither
    assert weights[0].tolist() == pytest.approx([0.375 / 0.5, 0.225 / 0.3, 0.4 / 0.2])
    assert miss < 1e-9


def test_two_projections_meet_both_bounds_and_keep_the_odds_ratio() -> None:
    labels = [torch.tensor([0] * 6 + [1] * 4), torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 1])]  # cells 4, 2, 1, 3
    boxes = [(torch.tensor([a, 0.0]).double(), torch.tensor([a, 1.0]).double()) for a in (0.3, 0.6)]

    weights, miss = project(labels, boxes)

    cells = weights[0][:, None] * torch.tensor([[0.4, 0.2], [0.1, 0.3]]).double() * weights[1][None]
    assert miss < 1e-6
    assert cells.sum(1)[0].item() == pytest.approx(0.3, abs=1e-6)
    assert cells.sum(0)[0].item() == pytest.approx(0.6, abs=1e-6)
    assert (cells[0, 0] * cells[1, 1] / cells[0, 1] / cells[1, 0]).item() == pytest.approx(6.0, rel=1e-6)


def test_bounds_that_already_hold_ask_for_nothing() -> None:
    labels = [torch.tensor([0, 1] * 50), torch.tensor([0, 0, 1, 1] * 25)]

    weights = aims([side({"left": (0.0, 0.9)}), light({"dark": (0.1, 1.0)})], labels)

    assert all(float(weight.abs().max()) < 1e-9 for weight in weights)


def test_narrower_bounds_take_more_samples() -> None:
    needed = [samples_needed([side({"left": (0.5 - room, 0.5 + room)})], 0.95) for room in (0.05, 0.03, 0.01)]

    assert needed == sorted(needed)
    assert needed[2] == pytest.approx(25 * needed[0], rel=0.01)  # as the inverse square of the room
