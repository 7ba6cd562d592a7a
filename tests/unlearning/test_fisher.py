"""The Fisher information is what the naive loop computes, however it is batched, shared out or interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from models.checkpoints import tensor_digest
from models.conditional import ConditionalModel
from tests.unlearning.fisher_models import (
    AddingVae,
    MlpVae,
    MoodyVae,
    SequenceVae,
    SharedVae,
    Small,
    TiedVae,
    TinyDiffusion,
    TwiceVae,
    examples,
    made,
    naive,
)
from unlearning import (
    DivergedError,
    Fisher,
    InputError,
    Interrupted,
    ParameterError,
    State,
    StateError,
    Step,
    fisher_information,
)
from unlearning.fisher import TOGETHER, draws_of
from unlearning.fisher_hooks import linear_layers

EXACT = 1e-5
"""The issue's bound; float32 sums of some hundred squares are nearer."""
CASES = [(MlpVae, 1), (AddingVae, 1), (MlpVae, 3), (TinyDiffusion, 1), (TinyDiffusion, 12)]
IDS = ["vae", "sum of layers", "vae of three draws", "diffusion of one draw", "diffusion"]


def names_of(model: ConditionalModel) -> list[str]:
    """All but the biases of attention keys, whose gradient is zero but for rounding."""
    return [name for name in model.scopes()["all"] if name != "key.bias"]


def computed(kind: type[Small], draws: int, n: int = 20, **values: Any) -> Fisher:
    model = made(kind)
    x, condition = examples(model, n)
    given = {"names": names_of(model), "seed": 5, "draws_per_example": draws, **values}
    return fisher_information(model, x, condition, **given)


def far(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference over a tensor's largest entry, the worst of all tensors."""
    return max(
        float((found[name] - expected[name]).abs().max()) / max(float(expected[name].max()), 1e-30) for name in found
    )


@pytest.mark.parametrize(("kind", "draws"), CASES, ids=IDS)
def test_it_is_the_naive_loops(kind: type[Small], draws: int) -> None:
    model = made(kind)
    x, condition = examples(model, 20)

    found = fisher_information(model, x, condition, names=names_of(model), seed=5, draws_per_example=draws)

    plan: Any = found.plan
    assert far(found.tensors, naive(model, x, condition, draws=draws, plan=plan, seed=5)) < EXACT
    assert (found.examples, found.draws) == (20, draws)
    assert {value.dtype for value in found.tensors.values()} == {torch.float32}


def test_linear_nets_take_the_hooks_and_all_others_autograd() -> None:
    assert [computed(kind, draws, n=3).estimator for kind, draws in CASES] == ["hooks", "hooks", *["autograd"] * 3]


def test_layers_that_share_a_weight_are_told_before_any_number_is() -> None:
    shared, plain = (cast(nn.Module, made(kind)) for kind in (SharedVae, MlpVae))
    both = dict(shared.named_parameters())

    assert linear_layers(shared, both) is None
    assert linear_layers(shared, {name: both[name] for name in ("first.weight", "third.bias")}) is not None
    assert len(linear_layers(plain, dict(plain.named_parameters())) or []) == 4


@pytest.mark.parametrize("kind", [SharedVae, TiedVae, TwiceVae, SequenceVae])
def test_weights_that_hooks_would_get_wrong_are_left_to_autograd(kind: type[Small]) -> None:
    model = made(kind)
    x, condition = examples(model, 8)
    used = ["third.weight", "fourth.weight", "fourth.bias"]

    found = fisher_information(model, x, condition, names=used, seed=5)

    assert found.estimator == "autograd"
    assert far(found.tensors, naive(model, x, condition, draws=1, plan="independent", seed=5)) < EXACT


@pytest.mark.parametrize(("kind", "draws"), CASES, ids=IDS)
@pytest.mark.parametrize("micro_batch", [1, 5, 7])
def test_micro_batches_change_rounding_alone(kind: type[Small], draws: int, micro_batch: int) -> None:
    assert far(computed(kind, draws, micro_batch=micro_batch).tensors, computed(kind, draws).tensors) < EXACT


def test_an_examples_draws_do_not_depend_on_where_a_range_is_cut() -> None:
    model = made(MlpVae)
    (whole,) = draws_of(model, 0, 3 * TOGETHER, 1, "independent", 4)

    for start, stop in ((0, 1), (TOGETHER - 1, TOGETHER + 1), (70, 180), (2 * TOGETHER, 3 * TOGETHER)):
        assert torch.equal(draws_of(model, start, stop, 1, "independent", 4)[0], whole[start:stop])
    assert len(whole.unique()) == whole.numel()


def test_stratified_draws_visit_every_timestep_once_and_independent_ones_do_not() -> None:
    model = made(TinyDiffusion)
    steps = TinyDiffusion.steps

    spread = draws_of(model, 3, 4, steps, "stratified", 4)[0]
    independent = draws_of(model, 3, 4, steps, "independent", 4)[0]

    assert spread.tolist() == list(range(steps))
    assert sorted(independent.tolist()) != list(range(steps))


def test_a_model_that_can_spread_its_draws_does_so_unless_told_otherwise() -> None:
    assert computed(TinyDiffusion, 4, n=2).plan == "stratified"
    assert computed(TinyDiffusion, 4, n=2, plan="independent").plan == "independent"
    assert computed(MlpVae, 1, n=2).plan == "independent"


def test_the_square_of_a_batchs_mean_gradient_is_another_quantity() -> None:
    model = made(MlpVae)
    x, condition = examples(model, 20)
    parameters = dict(cast(nn.Module, model).eval().named_parameters())
    losses = model.losses(x, condition, draws_of(model, 0, 20, 1, "independent", 5))
    gradients = torch.autograd.grad(losses.mean(), list(parameters.values()))
    defect = {name: gradient.square() for name, gradient in zip(parameters, gradients, strict=True)}

    assert far(defect, computed(MlpVae, 1).tensors) > 0.1


@pytest.mark.parametrize(("kind", "draws", "micro_batch"), [(MlpVae, 1, 6), (TinyDiffusion, 6, 4)])
@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_run_ends_bit_equal(
    kind: type[Small], draws: int, micro_batch: int, after: int, tmp_path: Path
) -> None:
    whole = computed(kind, draws, micro_batch=micro_batch)
    calls = []

    def interrupt(step: Step) -> None:
        calls.append(step)
        if len(calls) == after:
            step.snapshot().save(tmp_path / "state")
            raise Interrupted

    with pytest.raises(Interrupted):
        computed(kind, draws, micro_batch=micro_batch, callback=interrupt)
    resumed = computed(kind, draws, micro_batch=micro_batch, state=State.load(tmp_path / "state"))

    assert calls[-1].step < calls[-1].total == 20
    assert tensor_digest(resumed.tensors) == tensor_digest(whole.tensors)


def test_a_state_of_another_run_is_refused() -> None:
    states: list[State] = []
    computed(MlpVae, 1, callback=lambda step: states.append(step.snapshot()))

    for other in ({"seed": 6}, {"names": ["first.weight"]}, {"rows": range(10)}, {"reduction": "mean"}):
        with pytest.raises(StateError, match="belongs to"):
            computed(MlpVae, 1, state=states[0], **other)


def test_the_model_is_left_as_it_was() -> None:
    model = made(MlpVae)
    module = cast(nn.Module, model).train()
    module.get_submodule("second").eval()
    module.get_parameter("third.bias").requires_grad_(False)
    kept = torch.ones(10)
    module.get_parameter("first.bias").grad = kept
    before = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [one.training for one in module.modules()]
    x, condition = examples(model, 6)

    with torch.no_grad():
        found = fisher_information(model, x, condition, names=["third.bias", "fourth.weight"], seed=5)

    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert [one.training for one in module.modules()] == modes
    assert [name for name, value in module.named_parameters() if not value.requires_grad] == ["third.bias"]
    assert module.get_parameter("first.bias").grad is kept
    assert module.get_parameter("fourth.weight").grad is None
    module.requires_grad_(True)
    assert far(found.tensors, naive(model, x, condition, draws=1, plan="independent", seed=5)) < EXACT


def test_what_cannot_be_used_is_refused() -> None:
    model = made(MlpVae)
    x, condition = examples(model, 4)

    with pytest.raises(InputError, match="no parameter 'fifth'"):
        fisher_information(model, x, condition, names=["fifth"], seed=0)
    with pytest.raises(InputError, match="nothing to compute"):
        fisher_information(model, x, condition, names=[], seed=0)
    with pytest.raises(InputError, match="3 examples and 4 conditions"):
        fisher_information(model, x[:3], condition, names=["first.bias"], seed=0)
    with pytest.raises(InputError, match="torch module"):
        fisher_information(cast(ConditionalModel, object()), x, condition, names=["first.bias"], seed=0)
    for values, message in (
        ({"rows": range(2, 5)}, "rows"), ({"micro_batch": 0}, "micro_batch"), ({"draws_per_example": 0}, "draws"),
        ({"bfloat16": True}, "is for CUDA"), ({"reduction": "max"}, "sum or mean"), ({"plan": "stratified"}, "plan"),
    ):  # fmt: skip
        with pytest.raises(ParameterError, match=message):
            fisher_information(model, x, condition, names=["first.bias"], seed=0, **cast(Any, values))


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    model = made(MlpVae)
    x, condition = examples(model, 4)
    x[2] = float("inf")

    with pytest.raises(DivergedError, match="not finite"):
        fisher_information(model, x, condition, names=["first.bias"], seed=0)


def test_a_layer_that_is_applied_otherwise_after_the_trial_is_no_silent_error() -> None:
    model = made(MoodyVae)
    x, condition = examples(model, 9)
    x[6, 0] = 0.999

    with pytest.raises(InputError, match="more than once, unlike with the first examples"):
        fisher_information(model, x, condition, names=names_of(model), seed=0, micro_batch=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("kind", "draws"), CASES, ids=IDS)
def test_bfloat16_on_a_gpu_is_near_and_sums_in_float32(kind: type[Small], draws: int) -> None:
    model = made(kind)
    cast(nn.Module, model).cuda()
    x, condition = examples(model, 20)

    found = fisher_information(
        model, x, condition, names=names_of(model), seed=5, draws_per_example=draws, bfloat16=True
    )

    assert {(value.dtype, value.device.type) for value in found.tensors.values()} == {(torch.float32, "cpu")}
    assert found.precision == "bfloat16"
    assert far(found.tensors, computed(kind, draws).tensors) < 0.1


def test_a_parameter_that_no_loss_depends_on_has_zeros() -> None:
    model = made(SharedVae)
    cast(Any, model).unused = nn.Linear(2, 2)
    x, condition = examples(model, 3)

    found = fisher_information(model, x, condition, names=["first.bias", "unused.weight"], seed=0)

    assert not found.tensors["unused.weight"].any()
    assert found.tensors["first.bias"].any()
