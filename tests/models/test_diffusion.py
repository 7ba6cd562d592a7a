"""What diffusion models share: the forward process, its targets, its reverse, and guidance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditional import Sampling
from models.diffusion import Diffusion, Predict, check_sampling, guided
from models.errors import ArchitectureError
from tests.models.flow_table import generator

KINDS = ("epsilon", "v_prediction", "sample")
SHAPE = (2, 4, 4)


def process(**config: Any) -> Diffusion:
    return Diffusion({"num_train_timesteps": 100, "beta_end": 0.2, **config})


def abar(diffusion: Diffusion) -> Tensor:
    """The share of the image's variance left at each timestep, by its own product."""
    betas = torch.linspace(diffusion.config["beta_start"], diffusion.config["beta_end"], diffusion.terms)
    return (1 - betas.double()).cumprod(0).float()


def oracle(diffusion: Diffusion, x: Tensor) -> Predict:
    """The network that knows x_0."""

    def answer(noisy: Tensor, steps: Tensor) -> Tensor:
        left = abar(diffusion)[steps].view(-1, 1, 1, 1)
        return diffusion.target(x, steps, (noisy - left.sqrt() * x) / (1 - left).sqrt())

    return answer


def test_the_forward_process_is_the_papers() -> None:
    diffusion = process()
    x = torch.randn(6, *SHAPE, generator=generator())
    steps, noise = diffusion.draw(6, SHAPE, generator=generator(1))
    left = abar(diffusion)[steps].view(-1, 1, 1, 1)

    torch.testing.assert_close(diffusion.noised(x, steps, noise), left.sqrt() * x + (1 - left).sqrt() * noise)


def test_the_velocity_is_the_derivative_along_the_angle() -> None:
    diffusion = process(prediction_type="v_prediction")
    x = torch.randn(5, *SHAPE, generator=generator())
    steps, noise = diffusion.draw(5, SHAPE, generator=generator(1))
    left = abar(diffusion)[steps].view(-1, 1, 1, 1)

    torch.testing.assert_close(diffusion.target(x, steps, noise), left.sqrt() * noise - (1 - left).sqrt() * x)


@pytest.mark.parametrize("n", [1, 7, 100, 250])
def test_stratified_draws_have_one_timestep_in_each_part(n: int) -> None:
    steps, noise = process().draw_stratified(n, SHAPE, generator=generator())

    part = 100 / n
    assert all(math.floor(i * part) <= step <= math.ceil((i + 1) * part) for i, step in enumerate(steps.tolist()))
    assert noise.shape == (n, *SHAPE)


def test_as_many_stratified_draws_as_timesteps_are_each_once() -> None:
    steps, _ = process().draw_stratified(100, (1,), generator=generator())

    assert steps.tolist() == list(range(100))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_who_knows_the_image_draws_it(kind: str, clip: bool, spacing: str) -> None:
    diffusion = process(prediction_type=kind, clip_sample=clip, timestep_spacing=spacing)
    x = torch.rand(3, *SHAPE, generator=generator()) * 2 - 1

    drawn = diffusion.reverse(oracle(diffusion, x), torch.randn(3, *SHAPE, generator=generator(2)), steps=10)

    torch.testing.assert_close(drawn, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("terms", [1, 2, 3, 15, 17, 30])
def test_any_number_of_steps_draws_by_as_many_timesteps_of_the_range(terms: int, offset: int, spacing: str) -> None:
    diffusion = process(num_train_timesteps=terms, steps_offset=offset, timestep_spacing=spacing)
    for steps in range(1, terms + 1):
        asked: list[int] = []

        def answer(noisy: Tensor, at: Tensor, asked: list[int] = asked) -> Tensor:
            asked.append(int(at[0]))
            return torch.zeros_like(noisy)

        drawn = diffusion.reverse(answer, torch.ones(1, 1), steps)

        assert asked == sorted(set(asked), reverse=True)
        assert len(asked) == steps
        assert 0 <= asked[-1] <= asked[0] < terms
        assert bool(drawn.isfinite().all())


def test_an_offset_is_left_out_only_where_every_timestep_is_asked_for() -> None:
    diffusion = process(num_train_timesteps=20, steps_offset=1)
    lowest: dict[int, int] = {}

    for steps in (1, 10, 19, 20):

        def answer(noisy: Tensor, at: Tensor, steps: int = steps) -> Tensor:
            lowest[steps] = int(at[0])
            return noisy

        diffusion.reverse(answer, torch.ones(1, 1), steps)

    assert lowest == {1: 1, 10: 1, 19: 1, 20: 0}


def test_a_clipped_image_leaves_its_noise_to_the_next_step() -> None:
    diffusion = process(clip_sample=True, timestep_spacing="trailing")
    seen: list[tuple[Tensor, Tensor]] = []
    beyond = torch.full((1, *SHAPE), 5.0)  # whoever answers by it is clipped to 1 at every step

    def answer(noisy: Tensor, steps: Tensor) -> Tensor:
        seen.append((noisy, steps))
        return oracle(diffusion, beyond)(noisy, steps)

    diffusion.reverse(answer, torch.randn(1, *SHAPE, generator=generator()), steps=10)

    left = [abar(diffusion)[steps] for _, steps in seen]
    noises = [(x - a.sqrt()) / (1 - a).sqrt() for (x, _), a in zip(seen, left, strict=True)]
    torch.testing.assert_close(noises[-1], noises[0], rtol=1e-3, atol=1e-3)  # one and the same all along


def test_guidance_goes_from_no_condition_through_the_condition() -> None:
    def predict(x: Tensor, steps: Tensor, condition: Tensor) -> Tensor:
        return x + condition.view(-1, 1) + steps.view(-1, 1)

    x, steps = torch.randn(4, 3, generator=generator()), torch.arange(4)
    condition, null = torch.full((4,), 10.0), torch.full((4,), 2.0)

    for scale in (0.5, 1.0, 3.0):
        expected = x + steps.view(-1, 1) + 2 + scale * 8
        torch.testing.assert_close(guided(predict, condition, null, scale)(x, steps), expected)


def test_at_scale_1_the_network_is_asked_once() -> None:
    rows: list[int] = []

    def predict(x: Tensor, _steps: Tensor, _condition: Tensor) -> Tensor:
        rows.append(len(x))
        return x

    for scale in (1.0, 2.0):
        guided(predict, torch.zeros(4), torch.zeros(4), scale)(torch.zeros(4, 3), torch.arange(4))

    assert rows == [4, 8]


def test_a_process_is_made_while_models_are_built_without_memory() -> None:
    with torch.device("meta"):
        diffusion = process()

    assert diffusion.noised(torch.zeros(1, 1), torch.tensor([0]), torch.ones(1, 1)).device.type == "cpu"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "score"}, "prediction_type is one of epsilon"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule is one of"),
        ({"timestep_spacing": "even"}, "timestep_spacing is one of"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": 10**6}, "num_train_timesteps"),
        ({"steps_offset": 2}, "steps_offset"),
        ({"beta_start": 0.0}, "beta_start"),
        ({"beta_end": 1}, "beta_end"),
        ({"clip_sample": 1}, "clip_sample"),
        ({"clip_sample_range": 0.0}, "clip_sample_range"),
        ({"beta_start": math.nan}, "beta_start"),
    ],
)
def test_an_odd_configuration_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        process(**config)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        (Sampling(0, 1.0), "sampling steps"),
        (Sampling(101, 1.0), "from 1 to 100"),
        (Sampling(10, 0.0), "the condition would not count"),
        (Sampling(10, -1.0), "guidance_scale"),
        (Sampling(10, math.nan), "guidance_scale"),
        (Sampling(10, 101.0), "guidance_scale"),
    ],
)
def test_odd_sampling_is_refused(sampling: Sampling, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        check_sampling(sampling, 100)
