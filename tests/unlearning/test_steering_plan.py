"""What the first attempt of a steering run decided stands: a resumed run asks nobody again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from models.protocol import Flow
from tests.unlearning.tiny import N_BITS, DiagonalGaussian, blobs
from unlearning import (
    Constraint,
    Interrupted,
    State,
    StateError,
    SteeringParameters,
    SteeringResult,
    Step,
    UnreachableError,
    steer,
)
from unlearning.reachability import FEWEST
from unlearning.steering_plan import WITNESSES

SHORT = SteeringParameters(max_steps=6, pool=256, samples=120, probe=50, measure_every=2)
BOUNDARY = 3


class Judge:
    """Tells light images from others, and keeps what it was asked."""

    def __init__(self, least: float) -> None:
        self.least, self.asked = least, list[Tensor]()

    def __call__(self, images: Tensor) -> Tensor:
        self.asked.append(images)
        return (lightness(images) >= self.least).long()


def lightness(images: Tensor) -> Tensor:
    """Of the right rather than the left, so that no two samples tie: (n,) float64."""
    return (images.double() * torch.linspace(0.5, 1.5, images.shape[-1], dtype=torch.float64).sqrt()).mean((1, 2, 3))


def run(
    judge: Callable[[Tensor], Tensor],
    *,
    state: State | None = None,
    callback: Callable[[Step], None] | None = None,
    remember: Tensor | None = None,
    parameters: SteeringParameters = SHORT,
) -> SteeringResult:
    """A fifth of the samples are to be light."""
    wanted = Constraint(("other", "light"), judge, {"light": (0.2, 1.0)}, "light")
    flow = cast(Flow, DiagonalGaussian())
    return steer(flow, [wanted], parameters, n_bits=N_BITS, seed=5, state=state, callback=callback, remember=remember)


def interrupted(judge: Callable[[Tensor], Tensor], path: Path, remember: Tensor | None = None) -> State:
    """The state of a run that was stopped at a boundary."""

    def stop(step: Step) -> None:
        if step.step == BOUNDARY:
            step.snapshot().save(path)
            raise Interrupted

    with pytest.raises(Interrupted):
        run(judge, callback=stop, remember=remember)
    return State.load(path)


@pytest.fixture(scope="module")
def pool() -> Tensor:
    """The samples that runs of this file learn from, as their judge was shown them."""
    judge = Judge(0.0)
    with pytest.raises(UnreachableError):  # nothing is other than light
        steer(
            cast(Flow, DiagonalGaussian()),
            [Constraint(("other", "light"), judge, {"light": (0.0, 0.5)}, "light")],
            SHORT,
            n_bits=N_BITS,
            seed=5,
        )
    return judge.asked[0]


@pytest.fixture(scope="module")
def least(pool: Tensor) -> float:
    """Of lightness: just as many samples as can be learned from reach it."""
    return float(lightness(pool).sort().values[-FEWEST])


def test_a_resumed_run_does_not_judge_its_samples_again(least: float, pool: Tensor, tmp_path: Path) -> None:
    remember, resumed = blobs(40, 5), Judge(least)
    state = interrupted(Judge(least), tmp_path / "state.safetensors", remember)

    run(resumed, state=state, remember=remember)

    witnesses, *fresh = resumed.asked
    assert torch.equal(witnesses, pool[:WITNESSES])
    assert {len(images) for images in fresh} <= {SHORT.probe, SHORT.samples}


def test_one_sample_that_is_called_differently_elsewhere_changes_nothing(
    least: float, pool: Tensor, tmp_path: Path
) -> None:
    light = pool[lightness(pool) >= least][0]

    def elsewhere(images: Tensor) -> Tensor:
        return Judge(least)(images) * (images != light).flatten(1).any(1)

    whole = run(Judge(least))
    state = interrupted(Judge(least), tmp_path / "state.safetensors")
    with pytest.raises(UnreachableError):  # a run that begins there is one sample short
        run(elsewhere)
    again = run(elsewhere, state=state)

    assert again.before == whole.before
    assert (again.history, again.fractions) == (whole.history, whole.fractions)
    assert all(torch.equal(value, again.flow.state_dict()[name]) for name, value in whole.flow.state_dict().items())


def test_a_state_of_another_layout_is_refused_and_not_read(least: float, tmp_path: Path) -> None:
    state = interrupted(Judge(least), tmp_path / "state.safetensors")
    older = State({}, {**state.meta, "fingerprint": "of an older release"})

    with pytest.raises(StateError, match="belongs to a run"):
        run(Judge(least), state=older)


def test_a_judge_that_answers_otherwise_is_another_one(least: float, tmp_path: Path) -> None:
    state = interrupted(Judge(least), tmp_path / "state.safetensors")

    with pytest.raises(StateError, match="belongs to a run"):
        run(Judge(0.0), state=state)


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_a_refusal_is_stated_at_the_confidence_of_the_run(confidence: float) -> None:
    values = SteeringParameters(pool=SHORT.pool, confidence=confidence)
    never = Constraint(("other", "light"), Judge(256.0), {"other": (0.0, 0.5)}, "light")

    with pytest.raises(UnreachableError) as caught:
        steer(cast(Flow, DiagonalGaussian()), [never], values, n_bits=N_BITS, seed=5)

    assert caught.value.upper == pytest.approx(1 - ((1 - confidence) / 2) ** (1 / SHORT.pool))
