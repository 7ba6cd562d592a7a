"""On an accelerator, where there is one: the same run, its state on no device at all."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch

from models.protocol import Flow
from tests.unlearning.test_taming import FAST, PAPER
from tests.unlearning.tiny import N_BITS, blobs, trained_flow
from unlearning import Interrupted, State, Step, TamingParameters, tame

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("values", [FAST, dataclasses.replace(PAPER, max_steps=6)], ids=["fast", "paper"])
def test_a_run_goes_on_where_it_was_interrupted(values: TamingParameters) -> None:
    base = trained_flow().cuda()
    forget, remember = blobs(3, 77), blobs(96, 1)
    states: list[State] = []

    def interrupt(step: Step) -> None:
        if step.step == 3:
            states.append(step.snapshot())
            raise Interrupted

    with pytest.raises(Interrupted):
        tame(cast(Flow, base), forget, remember, values, n_bits=N_BITS, seed=5, callback=interrupt)
    result = tame(cast(Flow, base), forget, remember, values, n_bits=N_BITS, seed=5, state=states[0], micro_batch=16)

    assert {tensor.device.type for tensor in states[0].tensors.values()} == {"cpu"}
    assert {parameter.device.type for parameter in result.flow.parameters()} == {"cuda"}
    assert result.steps > 3
    assert result.met or values.engine == "paper"


def test_autocast_of_the_caller_changes_no_likelihood() -> None:
    base = trained_flow().cuda()
    forget, remember = blobs(2, 77), blobs(48, 1)
    values = TamingParameters(max_steps=2)
    plain = tame(cast(Flow, base), forget, remember, values, n_bits=N_BITS, seed=1)

    with torch.autocast("cuda", torch.bfloat16):
        under_autocast = tame(cast(Flow, base), forget, remember, values, n_bits=N_BITS, seed=1)

    assert under_autocast.z == pytest.approx(plain.z, abs=0.02)
