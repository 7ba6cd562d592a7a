"""The Fisher information of a real U-Net: every weight's, over every timestep once, however it is batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.ddpm import ClassDDPM
from unlearning import Fisher, fisher_information
from unlearning.randomness import stream

TERMS, EXAMPLES, SEED = 12, 3, 5
EXACT = 1e-5
"""The issue's bound, relative to a tensor's largest entry."""


@pytest.fixture(scope="module")
def model() -> ClassDDPM:
    draws = torch.Generator().manual_seed(0)
    model = ClassDDPM(
        (1, 8, 8), channels=[8, 16], layers=1, attention=[False, True], n_classes=3, norm_groups=4,
        scheduler={"num_train_timesteps": TERMS, "beta_end": 0.5}, sampling={"steps": 3}, generator=draws,
    )  # fmt: skip
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
    return model.eval()


def examples(model: ClassDDPM) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(1)
    return torch.rand(EXAMPLES, *model.image_shape, generator=draws) * 2 - 1, torch.arange(EXAMPLES)


def computed(model: ClassDDPM, **values: Any) -> Fisher:
    given = {"names": names_of(model), "seed": SEED, "draws_per_example": TERMS, **values}
    return fisher_information(model, *examples(model), **given)


def names_of(model: ClassDDPM) -> list[str]:
    """All but the biases of attention keys, whose gradient is zero but for rounding."""
    return [name for name in model.scopes()["all"] if not name.endswith("to_k.bias")]


def far(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((found[name] - value).abs().max()) / float(value.max()) for name, value in expected.items())


def test_it_is_the_naive_loops_over_every_timestep_once(model: ClassDDPM) -> None:
    x, labels = examples(model)
    parameters = {name: p for name, p in model.named_parameters() if name in names_of(model)}
    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for row in range(EXAMPLES):
        draws = model.draw_stratified(TERMS, generator=stream(SEED, "fisher", row))
        assert draws[0].tolist() == list(range(TERMS))
        total = torch.zeros(())
        for k in range(TERMS):
            total = (
                total
                + model.losses(
                    x[row : row + 1], labels[row : row + 1], (draws[0][k : k + 1], draws[1][k : k + 1])
                ).sum()
            )
        for name, gradient in zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True):
            expected[name] += gradient.square() / EXAMPLES

    found = computed(model)

    assert (found.plan, found.draws, found.estimator) == ("stratified", TERMS, "autograd")
    assert far(found.tensors, expected) < EXACT


@pytest.mark.parametrize("micro_batch", [1, 5])
def test_smaller_batches_change_rounding_alone(model: ClassDDPM, micro_batch: int) -> None:
    assert far(computed(model, micro_batch=micro_batch).tensors, computed(model).tensors) < EXACT
