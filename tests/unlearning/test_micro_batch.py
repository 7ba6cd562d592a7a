"""A micro-batch bounds memory and changes nothing else: not the gradient, not the run, not whose state it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.unlearning.tiny import N_BITS, blobs, trained_flow
from unlearning import Interrupted, State, Step, TamingParameters, tame
from unlearning.micro_batch import backward


class Counting(nn.Module):
    """A model that joins nothing across images and remembers how many it saw at once."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64))
        self.most = 0

    def log_prob(self, x: Tensor, share: Tensor) -> Tensor:
        """(n, 3), (n,) -> (n,)."""
        self.most = max(self.most, len(x))
        return share - (x * self.weight).sum(1).square()


def loss(nll: Tensor) -> Tensor:
    """Joins all images, as mu_R and sigma_R do."""
    return ((nll - nll.mean()) / nll.std()).abs().max() + nll.std().square()


@given(n=st.integers(2, 40), micro_batch=st.integers(1, 50), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_gradient_is_that_of_the_whole_batch(n: int, micro_batch: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, dtype=torch.float64, generator=generator)
    share = torch.randn(n, dtype=torch.float64, generator=generator)
    whole, parted = Counting(), Counting()
    expected = loss(-whole.log_prob(x, share).float())
    torch.autograd.backward(expected)

    value = backward(parted.log_prob, (x, share), loss, micro_batch)

    assert parted.most == min(n, micro_batch)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(parted.weight.grad, whole.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ["fast", "paper"])
def test_a_run_in_micro_batches_is_the_same_run(engine: str, tmp_path: Path) -> None:
    base, forget, remember = trained_flow(), blobs(3, 77), blobs(48, 1)
    values = TamingParameters.from_dict({"engine": engine, "max_steps": 4, "refresh_every": 2})
    whole = tame(base, forget, remember, values, n_bits=N_BITS, seed=1)
    path = tmp_path / "state.safetensors"

    def interrupt(step: Step) -> None:
        if step.step == 2:
            step.snapshot().save(path)
            raise Interrupted

    with pytest.raises(Interrupted):
        tame(base, forget, remember, values, n_bits=N_BITS, seed=1, callback=interrupt, micro_batch=7)
    resumed = tame(base, forget, remember, values, n_bits=N_BITS, seed=1, state=State.load(path), micro_batch=5)

    assert resumed.steps == whole.steps
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-2)
    assert resumed.z == pytest.approx(whole.z, abs=0.02)
    assert dataclasses.asdict(resumed.parameters) == dataclasses.asdict(whole.parameters)
