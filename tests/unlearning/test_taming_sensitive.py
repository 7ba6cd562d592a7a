"""Flows whose likelihoods move far under a small step are tamed as well: what would hold the run up is left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.autoregressive import MAF
from models.images import flow_input
from models.training import TrainingRecipe, fit_flow
from tests.unlearning.tiny import N_BITS, blobs
from unlearning import Interrupted, State, Step, TamingParameters, TamingResult, tame

SENSITIVE = TamingParameters(max_steps=400, learning_rate=0.1, noise_draws=1)
"""Far too high a rate, which the run shortens to about a hundredth."""


def halves(n: int, seed: int) -> Tensor:
    """Blobs whose right half is black, uint8 (n, 1, 8, 8): their mirror images are nothing of the kind."""
    images = blobs(n, seed)
    images[..., 4:] = 0
    return images


@pytest.fixture(scope="module")
def base() -> MAF:
    """A MAF to which black is certain: mirrored images lie thousands of sigma_R away."""
    generator = torch.Generator().manual_seed(0)
    flow = MAF((1, 8, 8), N_BITS, n_flow=3, hidden=96, generator=generator)
    images = halves(512, 1)
    flow.initialize(flow_input(flow, images[:256], N_BITS, generator))
    recipe = TrainingRecipe(steps=200, batch=64, learning_rate=3e-3, warmup=10, flip=False, shift=0)
    fit_flow(flow, images, recipe, n_bits=N_BITS, generator=generator)
    return flow


def tamed(base: MAF, values: TamingParameters, state: State | None = None, until: int | None = None) -> TamingResult:
    """A run, from a state or from the beginning; it fails at the step `until` with Interrupted."""

    def stop(step: Step) -> None:
        if step.step == until:
            raise Interrupted(step.snapshot())

    return tame(base, halves(4, 77), halves(200, 1), values, n_bits=N_BITS, seed=5, state=state, callback=stop)


def test_mirrored_images_that_the_flow_holds_for_nonsense_do_not_hold_the_run_up(base: MAF) -> None:
    result = tamed(base, TamingParameters(max_steps=400))

    assert result.met  # with them the rate would be shortened to some 1e-8, and nothing would move


def test_a_flow_that_would_learn_a_few_draws_of_noise_by_heart_gets_more_of_them(base: MAF) -> None:
    result = tamed(base, SENSITIVE)

    assert result.met  # without them, z on fresh noise is .6 where the steps' own is 4.9


def test_a_run_at_a_shortened_rate_resumes_bit_equal(base: MAF, tmp_path: Path) -> None:
    values = TamingParameters(max_steps=6, learning_rate=0.1, noise_draws=2)
    whole = tamed(base, values)

    with pytest.raises(Interrupted) as interrupted:
        tamed(base, values, until=3)
    state: State = interrupted.value.args[0]
    state.save(tmp_path / "state.safetensors")
    resumed = tamed(base, values, state=State.load(tmp_path / "state.safetensors"))

    assert resumed.history == whole.history
    assert resumed.z == whole.z
