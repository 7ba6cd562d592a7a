"""Memory: what a run takes is what was estimated, plans never take more than there is, and savings change no result."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.conditional import ConditionalModel
from models.ddpm import ClassDDPM
from models.vae import ConditionalVAE
from tests.unlearning.tiny_conditional import SHAPE, replay_of
from unlearning import (
    AmnesiaParameters,
    AmnesiaResult,
    Check,
    Examples,
    Fisher,
    Interrupted,
    Noise,
    NotEnoughMemoryError,
    ParameterError,
    State,
    Step,
    fisher_information,
    forget_conditions,
)
from unlearning.memory import Estimate, LiveBytes, Pass, amnesia_bytes, estimate, host_bytes, plan_memory
from unlearning.passes import recomputable, recomputing
from unlearning.working_copy import working_copy

CPU = torch.device("cpu")
SHORT = AmnesiaParameters(max_steps=4, batch=8, replay_batch=8, check_every=2)
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def ddpm() -> ClassDDPM:
    """Blocks of several layers, so that there is something to compute twice."""
    model = ClassDDPM(
        (1, 8, 8), channels=[16, 32], layers=2, attention=[False, True], n_classes=3, generator=torch.Generator()
    )
    with torch.no_grad():  # its last layers start at zero, and then nothing before them gets a gradient
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


def examples(model: ClassDDPM, n: int) -> Examples:
    x = torch.rand(n, *model.image_shape, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return Examples(x, torch.arange(n) % 2 + 1)


def fisher_of(model: ConditionalModel, replay: Examples, scope: str = "all") -> Fisher:
    return fisher_information(model, replay.x, replay.condition, names=model.scopes()[scope], seed=9)


def never(_model: object, _seed: int) -> Check:
    return Check(False)


def forget(model: ConditionalModel, replay: Examples, fisher: Fisher, **changes: Any) -> AmnesiaResult:
    arguments: dict[str, Any] = {
        "conditions": torch.tensor([0]), "surrogate": Noise(tuple(replay.x.shape[1:]), -1.0, 1.0), "replay": replay,
        "fisher": fisher, "parameters": SHORT, "criterion": never, "seed": 5,
    }  # fmt: skip
    return forget_conditions(model, **(arguments | changes))


sizes = st.integers(0, 2**40)
passes = st.builds(Pass, sizes, st.integers(1, 2**36))
estimates = st.builds(
    lambda held, kept, share: Estimate(
        {"weights": held}, kept, None if share is None else Pass(int(kept.fixed * share), max(1, int(kept.row * share)))
    ),
    sizes, passes, st.none() | st.floats(0, 1),
)  # fmt: skip


@given(estimates, sizes, st.integers(1, 4096), st.booleans())
def test_a_plan_fits_and_a_refusal_means_that_not_one_row_does(
    found: Estimate, available: int, most: int, recompute: bool
) -> None:
    try:
        plan = plan_memory(found, available, most_rows=most, recompute=recompute)
    except NotEnoughMemoryError:
        needs = [found.needed(1, again) for again in (False, True)]
        assert all(need is None or need > available for need in needs)
        return

    assert 1 <= plan.micro_batch <= most
    assert plan.needed == found.needed(plan.micro_batch, plan.recompute)
    assert plan.needed <= available
    more = found.needed(plan.micro_batch + 1, plan.recompute)
    assert plan.micro_batch == most or (more is not None and more > available)


@given(estimates, sizes, st.integers(1, 4096), st.booleans())
def test_activations_are_computed_twice_only_if_asked_for_or_if_no_row_fits_otherwise(
    found: Estimate, available: int, most: int, recompute: bool
) -> None:
    kept = found.needed(1, False)
    try:
        plan = plan_memory(found, available, most_rows=most, recompute=recompute)
    except NotEnoughMemoryError:
        return

    asked = recompute and found.recomputed is not None
    assert plan.recompute == (asked or (kept is not None and kept > available))


@given(estimates, sizes, sizes, st.integers(1, 4096))
def test_more_memory_never_gives_a_worse_plan(found: Estimate, one: int, other: int, most: int) -> None:
    def rank(available: int) -> tuple[bool, int]:
        try:
            plan = plan_memory(found, available, most_rows=most)
        except NotEnoughMemoryError:
            return False, 0
        return not plan.recompute, plan.micro_batch

    assert rank(min(one, other)) <= rank(max(one, other))


def test_where_one_row_was_too_much_to_be_measured_the_other_way_is_taken_or_it_is_refused() -> None:
    assert plan_memory(Estimate({}, None, Pass(10, 5)), 100, most_rows=64).micro_batch == 18
    with pytest.raises(NotEnoughMemoryError, match="more than 100") as refused:
        plan_memory(Estimate({"weights": 40}, None, None), 100, most_rows=64)
    assert (refused.value.needed, refused.value.available, refused.value.held) == (None, 100, 40)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_live_bytes_are_those_of_tensors_from_their_making_to_their_end(device: str) -> None:
    before = torch.zeros(1000, device=device)
    live = LiveBytes()

    with live:
        one = before + 1  # 4,000 bytes
        view = one.view(10, 100)
        two = view * 2  # 8,000
        del one, view, two
        three = before.to(torch.float64)  # 8,000
        three.add_(1)

    assert live.most == 8000


def test_live_bytes_are_what_a_backward_pass_needs() -> None:
    layers = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64, bias=False), nn.Sigmoid()) for _ in range(10)])
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes()

    with live:
        torch.autograd.backward(layers(torch.ones(5000, 64)).sum())

    kept = 11 * 5000 * 64 * 4  # the input, and what follows each layer
    assert kept <= live.most <= 1.2 * kept


def test_a_pass_of_many_rows_takes_what_two_passes_of_few_foretell() -> None:
    model, many = ddpm(), examples(ddpm(), 16)
    draws = model.draw(16, generator=torch.Generator().manual_seed(3))
    found = estimate(model, model.scopes()["all"], {}, many.x[:2], many.condition[:2], tuple(d[:2] for d in draws))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    for recompute in (False, True):
        live = LiveBytes()
        with recomputing(model, recompute), live:
            torch.autograd.backward(model.losses(many.x, many.condition, draws).sum())
        assert found.needed(16, recompute) == pytest.approx(live.most, rel=0.1)
    assert (found.needed(16, True) or 0) < 0.7 * (found.needed(16, False) or 0)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model, two = ddpm(), examples(ddpm(), 2)
    model.train()
    weights = copy.deepcopy(model.state_dict())

    estimate(model, model.scopes()["all"], {}, two.x, two.condition, model.draw(2, generator=torch.Generator()))

    assert model.training
    assert all(one.grad is None and one.requires_grad for one in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(getattr(one, "gradient_checkpointing", False) for one in model.modules())


def test_a_run_takes_the_memory_that_was_estimated() -> None:
    model = ddpm()
    replay = examples(model, 32)
    fisher = fisher_of(model, replay)
    holds = amnesia_bytes(list(model.parameters()), "adam", CPU)
    draws = model.draw(2, generator=torch.Generator())
    found = estimate(model, model.scopes()["all"], holds, replay.x[:2], replay.condition[:2], draws)
    live = LiveBytes()

    def save(step: Step) -> None:
        step.snapshot()

    with live:
        forget(model, replay, fisher, parameters=replace(SHORT, max_steps=3, batch=4, replay_batch=4), callback=save)

    assert live.most == pytest.approx(found.needed(4, False), rel=0.15)


def test_equal_gradients_whether_activations_are_kept_or_computed_twice() -> None:
    model, few = ddpm(), examples(ddpm(), 4)
    draws = model.draw(4, generator=torch.Generator().manual_seed(3))

    def gradients(recompute: bool) -> list[Tensor]:
        model.zero_grad()
        with recomputing(model, recompute):
            torch.autograd.backward(model.losses(few.x, few.condition, draws).sum())
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    kept, again = gradients(False), gradients(True)

    assert recomputable(model)
    assert len(kept) == len(list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))


@pytest.mark.parametrize("make", [fisher_of, None], ids=["fisher", "run"])
def test_recomputing_changes_neither_a_fisher_information_nor_a_run(make: Callable[..., Fisher] | None) -> None:
    model = ddpm()
    replay = examples(model, 6)
    fisher = fisher_of(model, replay)
    if make is None:
        plain, again = (forget(model, replay, fisher, recompute=on).model.state_dict() for on in (False, True))
    else:
        names = model.scopes()["all"]
        plain, again = (
            dict(
                fisher_information(model, replay.x, replay.condition, names=names, seed=9, recompute=on).tensors
            )
            for on in (False, True)
        )  # fmt: skip

    assert all(torch.equal(value, again[name]) for name, value in plain.items())
    assert not any(getattr(one, "gradient_checkpointing", False) for one in model.modules())


def test_a_model_that_cannot_recompute_is_passed_through_as_ever() -> None:
    model = nn.Linear(2, 2)

    assert not recomputable(model)
    with recomputing(model):
        assert model(torch.ones(1, 2)).shape == (1, 2)


def test_a_working_copy_holds_twice_what_is_trained_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    mine = working_copy(model, {"2.weight", "2.bias"}, CPU)

    own, base = dict(mine.named_parameters()), dict(model.named_parameters())
    apart = {name for name in base if own[name].data_ptr() != base[name].data_ptr()}
    assert apart == {"2.weight", "2.bias"} == {name for name, value in own.items() if value.requires_grad}
    assert all(value.requires_grad for value in base.values())
    assert all(one.data_ptr() != other.data_ptr() for one, other in zip(mine.buffers(), model.buffers(), strict=True))


def test_a_working_copy_can_be_moved_without_its_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    mine = working_copy(model, {"1.weight"}, CPU).to(torch.float64)

    assert {value.dtype for value in mine.parameters()} == {torch.float64}
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_tied_weights_stay_tied_in_a_working_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight

    mine = working_copy(model, {"0.weight"}, CPU)

    assert mine[1].weight is mine[0].weight
    assert mine[1].weight.requires_grad


def test_what_is_held_adds_up_per_weight() -> None:
    weights = [nn.Parameter(torch.zeros(100, 100)), nn.Parameter(torch.zeros(10))]
    bytes_of = 4 * 10_010

    adam, small = (amnesia_bytes(weights, name, torch.device("cuda")) for name in ("adam", "adam-8bit"))

    assert adam["moments"] == 2 * bytes_of
    assert small["moments"] == 20_000 + 312 + 80  # a byte each, scales, and the small tensor in float32
    assert {adam[name] for name in ("copy", "gradients", "fisher")} == {bytes_of}
    assert host_bytes(weights, "adam") == {"rollback": 3 * bytes_of, "state": 3 * bytes_of}
    assert amnesia_bytes(weights, "adam", CPU) == adam | host_bytes(weights, "adam")


def vae_run(**changes: Any) -> AmnesiaResult:
    model = ConditionalVAE(SHAPE, n_classes=3, hidden=(80, 64), latent=2, generator=torch.Generator().manual_seed(0))
    replay = replay_of(model, [1, 2], 64)
    surrogate = Noise((SHAPE[1] * SHAPE[2],), 0.0, 1.0)
    return forget(model, replay, fisher_of(model, replay), surrogate=surrogate, **changes)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="bitsandbytes is installed")
def test_small_moments_without_their_library_are_refused_with_what_to_install() -> None:
    with pytest.raises(ParameterError, match=r"forgetd\[gpu\]") as refused:
        vae_run(parameters=replace(SHORT, optimiser="adam-8bit"))

    assert refused.value.name == "optimiser"


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
def test_a_run_with_small_moments_is_resumed_to_the_bit() -> None:
    parameters, states = replace(SHORT, optimiser="adam-8bit"), list[State]()

    def stop(step: Step) -> None:
        if step.step == 2:
            states.append(step.snapshot())
            raise Interrupted

    whole = vae_run(parameters=parameters).model.state_dict()
    with pytest.raises(Interrupted):
        vae_run(parameters=parameters, callback=stop)
    resumed = vae_run(parameters=parameters, state=states[0]).model.state_dict()

    assert any(value.dtype == torch.uint8 for value in states[0].tensors.values())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ParameterError, match="adam-8bit"):
        AmnesiaParameters.from_dict({"optimiser": "sgd"})
