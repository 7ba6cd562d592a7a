"""Flow taming: what it promises whatever the flow, the engine and the moment it is interrupted."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from torch import Tensor

from models.glow import Glow
from models.images import quantize
from models.protocol import Flow
from tests.unlearning.tiny import N_BITS, DiagonalGaussian, blobs, trained_flow
from unlearning import (
    DivergedError,
    InputError,
    Interrupted,
    ParameterError,
    State,
    StateError,
    Step,
    TamingParameters,
    TamingResult,
    generate_remember,
    tame,
    taming_fast,
)
from unlearning.taming_paper import gaussian_kl
from unlearning.taming_parameters import LossTerm

FAST = TamingParameters(
    max_steps=300, delta=2.0, keep_weight=2.0, learning_rate=1e-2, clip=10.0, remember_batch=24
)  # a flow of two scales on 8 x 8 pixels needs a shove
PAPER = TamingParameters(engine="paper", max_steps=12, learning_rate=5e-4, refresh_every=4)  # for test_devices


@pytest.fixture(scope="module")
def base() -> Glow:
    """A flow trained on blobs, never modified by a test."""
    return trained_flow()


@pytest.fixture(scope="module")
def forget() -> Tensor:
    """Three blobs to forget."""
    return blobs(3, 77)


@pytest.fixture(scope="module")
def remember() -> Tensor:
    """Blobs to remember."""
    return blobs(96, 1)


@pytest.fixture(scope="module")
def tamed(base: Glow, forget: Tensor, remember: Tensor) -> TamingResult:
    """One uninterrupted run of the fast engine."""
    return tame(base, forget, remember, FAST, n_bits=N_BITS, seed=5)


def weights(result: TamingResult) -> dict[str, Tensor]:
    """The tamed flow's state."""
    return result.flow.state_dict()


class StopAfter:
    """A callback that takes a snapshot at one boundary, by way of a file, and interrupts."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def __call__(self, step: Step) -> None:
        if step.step == self.step:
            step.snapshot().save(self.path)
            raise Interrupted


def test_forget_images_pass_the_criterion_on_fresh_noise(tamed: TamingResult) -> None:
    assert tamed.met
    assert len(tamed.z) == 3
    assert min(tamed.z) >= FAST.delta * (1 - FAST.tolerance)
    assert tamed.steps == len(tamed.history)


def test_the_base_is_not_modified(base: Glow, forget: Tensor, remember: Tensor) -> None:
    before = copy.deepcopy(base.state_dict())

    tame(base, forget, remember, TamingParameters(max_steps=3), n_bits=N_BITS, seed=0)

    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_all_scales_but_the_last_are_left_as_they_were_by_the_fast_engine(base: Glow, tamed: TamingResult) -> None:
    frozen = {name for name in base.state_dict() if name.startswith("blocks.0.")}

    assert all(torch.equal(base.state_dict()[name], weights(tamed)[name]) for name in frozen)


def test_a_run_resumed_after_rejected_confirmations_ends_bit_equal(
    base: Glow, forget: Tensor, remember: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taming_fast, "CLEARANCE", -0.5)  # confirmations are asked for too soon
    states: list[State] = []
    whole = tame(
        base, forget, remember, FAST, n_bits=N_BITS, seed=2, callback=lambda step: states.append(step.snapshot())
    )
    assert whole.met
    rejected = [number for number, state in enumerate(states) if state.meta["attempts"]]
    assert rejected
    path = tmp_path / "state.safetensors"

    for number in {rejected[0], rejected[-1], len(states) - 1}:  # the last: where the weights are settled
        states[number].save(path)
        resumed = tame(base, forget, remember, FAST, n_bits=N_BITS, seed=2, state=State.load(path))

        assert resumed.steps == whole.steps
        assert resumed.z == whole.z
        assert all(torch.equal(weights(whole)[name], value) for name, value in weights(resumed).items())


def test_what_the_base_has_forgotten_already_is_left_alone(
    tamed: TamingResult, forget: Tensor, remember: Tensor
) -> None:
    nearer = dataclasses.replace(FAST, delta=FAST.delta / 4)

    again = tame(cast(Flow, tamed.flow), forget, remember, nearer, n_bits=N_BITS, seed=9)

    assert again.met
    assert again.steps == 0
    assert all(torch.equal(weights(tamed)[name], value) for name, value in weights(again).items())


def test_each_of_many_images_has_its_turn(base: Glow, remember: Tensor) -> None:
    values = dataclasses.replace(FAST, forget_batch=4, max_steps=10)
    lowest: list[float] = []

    tame(
        base, blobs(18, 55), remember, values, n_bits=N_BITS, seed=1,
        callback=lambda step: lowest.append(step.metrics["z_min"]),
    )  # fmt: skip

    assert lowest[3] == -torch.inf  # 16 of 18 images
    assert all(torch.isfinite(torch.tensor(lowest[4:])))


def test_a_state_of_another_run_is_refused(base: Glow, forget: Tensor, remember: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        tame(base, forget, remember, FAST, n_bits=N_BITS, seed=3, callback=StopAfter(1, path))

    with pytest.raises(StateError, match="other images"):
        tame(base, forget, remember, FAST, n_bits=N_BITS, seed=4, state=State.load(path))


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"not a state")

    with pytest.raises(StateError):
        State.load(path)


def test_a_criterion_out_of_reach_is_not_met(base: Glow, forget: Tensor, remember: Tensor) -> None:
    result = tame(base, forget, remember, TamingParameters(delta=20.0, max_steps=2), n_bits=N_BITS, seed=0)

    assert not result.met
    assert result.steps == 2
    assert len(result.z) == 3


def test_near_duplicates_leave_the_remember_set_and_are_named(base: Glow, forget: Tensor, remember: Tensor) -> None:
    polluted = torch.cat([remember[:4], forget[1:2], remember[4:], forget[0:1].flip(-1)])

    result = tame(base, forget, polluted, TamingParameters(max_steps=1), n_bits=N_BITS, seed=0)

    assert {4, len(polluted) - 1} <= set(result.removed_near_duplicates)


def test_a_remember_set_of_nothing_but_the_forget_images_is_refused(base: Glow, forget: Tensor) -> None:
    with pytest.raises(InputError, match="are left"):
        tame(base, forget, forget.repeat(2, 1, 1, 1), FAST, n_bits=N_BITS, seed=0)


def test_the_same_photo_twice_is_forgotten_twice(base: Glow, forget: Tensor, remember: Tensor) -> None:
    result = tame(base, forget[[0, 0]], remember, FAST, n_bits=N_BITS, seed=0)

    assert result.met
    assert len(result.z) == 2


@pytest.mark.parametrize("engine", ["fast", "paper"])
def test_a_foreign_flow_can_be_tamed(forget: Tensor, remember: Tensor, engine: str) -> None:
    flow = DiagonalGaussian()
    values = TamingParameters.from_dict({"engine": engine, "max_steps": 3})

    result = tame(cast(Flow, flow), forget, remember, values, n_bits=N_BITS, seed=0)

    assert result.steps == 3
    assert not torch.equal(cast(Any, result.flow).mean, flow.mean)


def test_samples_of_the_base_stand_in_for_a_remember_set(base: Glow) -> None:
    first, second = (generate_remember(base, 5, N_BITS, seed=1) for _ in range(2))

    assert first.shape == (5, 1, 8, 8)
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    assert quantize(first, N_BITS).abs().max() <= 0.5


def test_samples_of_a_foreign_flow_leave_the_global_seed_alone() -> None:
    before = torch.get_rng_state()

    images = generate_remember(cast(Flow, DiagonalGaussian()), 4, N_BITS, seed=1)

    assert images.shape == (4, 1, 8, 8)
    assert torch.equal(before, torch.get_rng_state())


def test_a_likelihood_that_is_not_finite_stops_the_run(forget: Tensor, remember: Tensor) -> None:
    flow = DiagonalGaussian()
    with torch.no_grad():
        flow.mean[0] = torch.nan

    with pytest.raises(DivergedError):
        tame(cast(Flow, flow), forget, remember, TamingParameters(max_steps=3), n_bits=N_BITS, seed=0)


@pytest.mark.parametrize(
    ("forget_shape", "dtype"), [((0, 1, 8, 8), torch.uint8), ((2, 3, 8, 8), torch.uint8), ((2, 1, 8, 8), torch.float32)]
)
def test_images_that_do_not_fit_are_refused(
    base: Glow, remember: Tensor, forget_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    with pytest.raises(InputError):
        tame(base, torch.zeros(forget_shape, dtype=dtype), remember, FAST, n_bits=N_BITS, seed=0)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"detla": 4}, "detla"),
        ({"delta": "4"}, "delta"),
        ({"delta": 0}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"max_steps": True}, "max_steps"),
        ({"tolerance": 1}, "tolerance"),
        ({"engine": "slow"}, "engine"),
        ({"learning_rate": -1e-3}, "learning_rate"),
        ({"without": ["nll"]}, "without"),
        ({"engine": "paper", "without": ["nil"]}, "without"),
        ({"engine": "paper", "without": ["nll", "nll"]}, "without"),
        ({"engine": "paper", "without": ["forget", "nll", "kl_forward", "kl_reverse"]}, "without"),
        ({"engine": "paper", "without": "nll"}, "without"),
    ],
)
def test_a_wrong_parameter_is_named(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ParameterError) as caught:
        TamingParameters.from_dict(values)

    assert caught.value.name == name
    assert caught.value.message


@pytest.mark.parametrize("values", [TamingParameters(delta=3.0), TamingParameters("paper", without=("kl_forward",))])
def test_parameters_survive_the_wire(values: TamingParameters) -> None:
    assert json.loads(json.dumps(values.to_dict())) == values.to_dict()

    assert TamingParameters.from_dict(values.to_dict()) == values.resolved()


def test_the_divergence_has_no_slope_where_both_sides_agree() -> None:
    mean, std = torch.tensor(2.0, requires_grad=True), torch.tensor(0.15, requires_grad=True)
    other = torch.tensor(2.0), torch.tensor(0.15)

    for divergence in (gaussian_kl(*other, mean, std), gaussian_kl(mean, std, *other)):
        gradients = torch.autograd.grad(divergence, (mean, std))
        assert float(divergence.detach()) == pytest.approx(0.0, abs=1e-6)
        assert all(abs(float(gradient)) < 1e-5 for gradient in gradients)


ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    # What is left out, the weights that leave out the same, and the weight that what stays keeps.
    "remember": ({"without": ("remember",)}, {"alpha": 1.0}, 0.6),
    "forget": ({"without": ("forget",)}, {"alpha": 0.0}, 0.4),
    "both divergences": ({"without": ("forget", "kl_forward", "kl_reverse")}, {"alpha": 0.0, "gamma": 0.0}, 0.4 * 0.4),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_a_term_left_out_is_a_term_of_weight_zero(base: Glow, forget: Tensor, remember: Tensor, name: str) -> None:
    left_out, weightless, share = ABLATIONS[name]

    first, second = (
        tame(base, forget, remember, TamingParameters("paper", max_steps=1, **values), n_bits=N_BITS, seed=0)
        for values in (left_out, weightless)
    )

    assert first.history[0]["loss"] == pytest.approx(share * second.history[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("term", get_args(LossTerm))
def test_every_term_matters(base: Glow, forget: Tensor, remember: Tensor, term: LossTerm) -> None:
    whole = _weights(base, forget, remember, TamingParameters(engine="paper", max_steps=3))
    without = _weights(base, forget, remember, TamingParameters(engine="paper", max_steps=3, without=(term,)))

    assert float((whole - without).abs().max()) > 1e-5


def _weights(base: Glow, forget: Tensor, remember: Tensor, values: TamingParameters) -> Tensor:
    result = tame(base, forget, remember, values, n_bits=N_BITS, seed=0)
    return torch.cat([p.detach().flatten() for p in result.flow.parameters()])
