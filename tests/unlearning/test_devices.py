"""On an accelerator, where there is one: the same run, its state on no device at all."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch

from models.protocol import Flow
from tests.unlearning.test_amnesia_memory import SHORT, ddpm, examples, forget
from tests.unlearning.test_taming import FAST, PAPER
from tests.unlearning.tiny import N_BITS, blobs, trained_flow
from unlearning import Fisher, Interrupted, State, Step, TamingParameters, fisher_information, tame
from unlearning.memory import amnesia_bytes, estimate
from unlearning.passes import bfloat16_on

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


def fisher_on(device: str, **changes: bool) -> Fisher:
    model = ddpm().to(device)
    some = examples(ddpm(), 8)
    names = model.scopes()["all"]
    return fisher_information(model, some.x, some.condition, names=names, seed=9, draws_per_example=4, **changes)


@pytest.mark.parametrize("optimiser", ["adam", "adam-8bit"])
def test_selective_amnesia_goes_on_where_it_was_interrupted_and_holds_the_rest_on_the_host(optimiser: str) -> None:
    if optimiser == "adam-8bit":
        pytest.importorskip("bitsandbytes")
    base, replay = ddpm().cuda(), examples(ddpm(), 16)
    fisher, values = fisher_on("cuda"), dataclasses.replace(SHORT, optimiser=optimiser)
    states: list[State] = []

    def interrupt(step: Step) -> None:
        if step.step == 3:
            states.append(step.snapshot())
            raise Interrupted

    with pytest.raises(Interrupted):
        forget(base, replay, fisher, parameters=values, callback=interrupt)
    result = forget(base, replay, fisher, parameters=values, state=states[0])

    assert {tensor.device.type for tensor in states[0].tensors.values()} == {"cpu"}
    assert {parameter.device.type for parameter in result.model.parameters()} == {"cuda"}
    assert result.steps == SHORT.max_steps
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())


def test_a_model_on_the_host_is_trained_on_the_device() -> None:
    base, replay = ddpm(), examples(ddpm(), 16)

    result = forget(base, replay, fisher_on("cpu"), device=torch.device("cuda"))

    assert {parameter.device.type for parameter in result.model.parameters()} == {"cuda"}
    assert {parameter.device.type for parameter in base.parameters()} == {"cpu"}


def test_bfloat16_gives_about_the_same_fisher_information_in_float32() -> None:
    if not bfloat16_on(torch.device("cuda", torch.cuda.current_device())):
        pytest.skip("needs bfloat16")
    exact, rounded = fisher_on("cuda"), fisher_on("cuda", bfloat16=True)

    assert rounded.precision == "bfloat16"
    assert {value.dtype for value in rounded.tensors.values()} == {torch.float32}
    one, other = (torch.cat([value.flatten() for value in found.tensors.values()]) for found in (exact, rounded))
    assert float(torch.nn.functional.cosine_similarity(one, other, dim=0)) > 0.98


def test_what_a_run_allocates_at_most_was_estimated() -> None:
    base, replay, fisher = ddpm().cuda(), examples(ddpm(), 16), fisher_on("cuda")
    holds = amnesia_bytes(list(base.parameters()), "adam", torch.device("cuda"))
    draws = base.draw(2, generator=torch.Generator())
    found = estimate(base, base.scopes()["all"], holds, replay.x[:2], replay.condition[:2], draws)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()

    forget(base, replay, fisher, micro_batch=8)

    needed = found.needed(8, False)
    assert needed is not None
    assert torch.cuda.max_memory_allocated() - before <= 1.25 * needed
