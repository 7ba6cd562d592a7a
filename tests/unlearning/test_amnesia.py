"""Selective Amnesia: a class shows something else on fresh samples, the others stay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditional import ConditionalModel, Draws
from models.vae import ConditionalVAE
from tests.unlearning.tiny_conditional import RUBBLE, SHAPE, rarely, replay_of, shown, trained_vae
from unlearning import (
    AmnesiaParameters,
    AmnesiaResult,
    Check,
    DivergedError,
    Examples,
    Fisher,
    FisherError,
    InputError,
    Noise,
    ParameterError,
    Pool,
    State,
    StateError,
    Step,
    fisher_information,
    forget_conditions,
)

FORGOTTEN, KEPT = 0, [1, 2]
PIXELS = SHAPE[1] * SHAPE[2]
NOISE = Noise((PIXELS,), 0.0, 1.0)
QUICK = AmnesiaParameters(max_steps=1500, batch=64, replay_batch=64, learning_rate=3e-3, check_every=25)
SHORT = replace(QUICK, max_steps=12, check_every=4)


@pytest.fixture(scope="module")
def base() -> ConditionalVAE:
    return trained_vae()


@pytest.fixture(scope="module")
def replay(base: ConditionalVAE) -> Examples:
    return replay_of(base, KEPT)


@pytest.fixture(scope="module")
def fisher(base: ConditionalVAE, replay: Examples) -> Fisher:
    return fisher_information(base, replay.x, replay.condition, names=base.scopes()["all"], seed=9)


def scaled(fisher: Fisher, factor: float) -> Fisher:
    return replace(fisher, tensors={name: factor * value for name, value in fisher.tensors.items()})


def narrowed(fisher: Fisher, names: Sequence[str]) -> Fisher:
    return replace(fisher, tensors={name: fisher.tensors[name] for name in names})


Run = Callable[..., AmnesiaResult]


@pytest.fixture
def run(base: ConditionalVAE, replay: Examples, fisher: Fisher) -> Run:
    def run(parameters: AmnesiaParameters = QUICK, **changes: Any) -> AmnesiaResult:
        arguments: dict[str, Any] = {
            "model": base, "conditions": torch.tensor([FORGOTTEN]), "surrogate": NOISE, "replay": replay,
            "fisher": fisher, "criterion": rarely(FORGOTTEN), "seed": 5,
        }  # fmt: skip
        return forget_conditions(parameters=parameters, **(arguments | changes))

    return run


def never(_model: object, _seed: int) -> Check:
    return Check(False)


@torch.no_grad()
def nats(model: ConditionalVAE, examples: Examples) -> float:
    """The mean loss of examples."""
    draws = model.draw(len(examples), generator=torch.Generator().manual_seed(1))
    return float(model.losses(examples.x, examples.condition, draws).mean())


def vae(model: object) -> ConditionalVAE:
    assert isinstance(model, ConditionalVAE)
    return model


def test_the_base_shows_its_classes(base: ConditionalVAE) -> None:
    assert all(shown(base, label)[label] >= 0.95 for label in (FORGOTTEN, *KEPT))


def test_a_class_is_forgotten_on_fresh_samples_and_the_others_stay(base: ConditionalVAE, run: Run) -> None:
    before = copy.deepcopy(base.state_dict())

    result = run()

    assert result.met
    assert result.steps < 1500
    assert shown(vae(result.model), FORGOTTEN)[FORGOTTEN] <= 0.1
    assert shown(vae(result.model), FORGOTTEN)[RUBBLE] >= 0.8
    for label in KEPT:
        assert shown(vae(result.model), label)[label] >= shown(base, label)[label] - 0.03
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_class_becomes_another(base: ConditionalVAE, run: Run) -> None:
    other = replay_of(base, [1], seed=4)

    result = run(surrogate=Pool(other.x), criterion=rarely(FORGOTTEN, instead=1, at_least=0.95))

    assert shown(vae(result.model), FORGOTTEN)[1] >= 0.9
    assert shown(vae(result.model), 2)[2] >= 0.9


def test_without_replay_and_penalty_what_others_show_becomes_unlikely(base: ConditionalVAE, run: Run) -> None:
    fresh = replay_of(base, KEPT, seed=8)
    bare, whole = (
        run(replace(QUICK, max_steps=300, without=without), criterion=never) for without in (("replay", "penalty"), ())
    )

    lost, kept = (nats(vae(found.model), fresh) - nats(base, fresh) for found in (bare, whole))
    assert lost > 1.0
    assert kept < 0.1 * lost


def test_the_penalty_holds_the_weights(run: Run) -> None:
    loose, firm = (run(replace(SHORT, strength=strength), criterion=never) for strength in (0.0, 1e4))

    assert firm.drift < 0.5 * loose.drift


@pytest.mark.parametrize("mode", ["default", "paper"])
def test_the_strength_of_the_default_mode_alone_is_the_same_for_a_scaled_fisher_information(
    mode: str, run: Run, fisher: Fisher
) -> None:
    parameters = replace(SHORT, mode=mode, strength=50.0)
    once, more = (run(parameters, fisher=scaled(fisher, factor), criterion=never) for factor in (1.0, 1024.0))

    same = all(
        torch.allclose(value, more.model.state_dict()[name], atol=1e-6)
        for name, value in once.model.state_dict().items()
    )
    assert same == (mode == "default")


def test_the_papers_penalty_is_half_lambda_times_the_weighted_square_of_the_drift(
    base: ConditionalVAE, run: Run, fisher: Fisher
) -> None:
    seen: list[tuple[float, float]] = []
    weights = {name: value.detach().clone() for name, value in base.named_parameters()}

    def look(step: Step) -> None:
        now = {name: value.to(torch.float64) for name, value in step.snapshot().tensors.items()}
        of = fisher.tensors
        moved = [(of[name] * (now[f"weight.{name}"] - weights[name]).square()).sum() for name in of]
        seen.append((step.losses["penalty"], float(0.5 * 3.0 * torch.stack(moved).sum())))

    run(replace(SHORT, mode="paper", strength=3.0), callback=look)

    told, computed = zip(*seen, strict=True)
    assert told[0] == 0
    assert told[1:] == pytest.approx(computed[:-1], rel=1e-4)  # each step tells the penalty of the weights before it


def test_a_state_of_another_run_is_refused(run: Run) -> None:
    states: list[State] = []
    run(SHORT, callback=lambda step: states.append(step.snapshot()))

    for other in ({"seed": 6}, {"conditions": torch.tensor([1])}, {"surrogate": Noise((PIXELS,), 0.0, 0.5)}):
        with pytest.raises(StateError, match="another"):
            run(SHORT, state=states[0], **other)


def test_micro_batches_change_rounding_alone(run: Run) -> None:
    whole, parts = run(SHORT), run(SHORT, micro_batch=17)

    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, parts.model.state_dict()[name], atol=2e-4, rtol=1e-3)


def test_a_criterion_out_of_reach_is_not_met(run: Run) -> None:
    result = run(SHORT, criterion=rarely(FORGOTTEN, at_most=-1.0))

    assert not result.met
    assert result.steps == SHORT.max_steps


def test_only_what_the_fisher_information_names_is_trained(base: ConditionalVAE, run: Run, fisher: Fisher) -> None:
    names = base.scopes()["decoder"]

    result = run(SHORT, fisher=narrowed(fisher, names))

    changed = {
        name for name, value in result.model.state_dict().items() if not torch.equal(value, base.state_dict()[name])
    }
    assert changed == set(names)


class Breaking(ConditionalVAE):
    """Its loss is not finite once, or from then on."""

    calls: int = 0
    broken: range = range(0)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """As ever, or NaN."""
        found = super().losses(x, condition, draws)
        self.calls += 1
        return found * float("nan") if self.calls in self.broken else found


def breaking(base: ConditionalVAE, broken: range) -> ConditionalModel:
    model = copy.deepcopy(base)
    model.__class__ = Breaking
    vae(model).broken = broken  # type: ignore[attr-defined]  # it is a Breaking now
    return model


def call(step: int) -> range:
    """The first loss after so many steps: two calls of a step, and two of the replay before the first."""
    return range(2 * step + 3, 2 * step + 4)


def test_a_step_that_is_not_finite_leads_back_to_the_last_look_at_half_the_rate(base: ConditionalVAE, run: Run) -> None:
    weights: dict[int, Tensor] = {}

    def keep(step: Step) -> None:
        tensors = step.snapshot().tensors
        weights[step.step] = torch.cat([tensors[f"weight.{name}"].flatten() for name, _ in base.named_parameters()])

    result = run(SHORT, model=breaking(base, call(step=5)), callback=keep)

    assert result.rollbacks == 1
    assert [row["step"] for row in result.history if "surrogate" not in row] == [6]
    assert torch.equal(weights[6], weights[4])
    assert float((weights[7] - weights[6]).norm()) < 0.8 * float((weights[5] - weights[4]).norm())


def test_weights_that_a_look_took_are_not_gone_back_to_before_a_step_has_shown_them_good(
    base: ConditionalVAE, run: Run
) -> None:
    weights: list[Tensor] = []

    def keep(step: Step) -> None:
        weights.append(step.snapshot().tensors["weight.decoder.0.weight"])

    run(SHORT, model=breaking(base, call(step=4)), callback=keep)

    assert torch.equal(weights[4], base.state_dict()["decoder.0.weight"])


def test_a_run_that_stays_broken_is_given_up(base: ConditionalVAE, run: Run) -> None:
    with pytest.raises(DivergedError, match="learning rate"):
        run(SHORT, model=breaking(base, range(5, 1000)))


def test_what_cannot_be_used_is_refused(run: Run, fisher: Fisher, replay: Examples) -> None:
    for odd in ({}, {"nothing.weight": torch.ones(3)}):
        with pytest.raises(FisherError, match="other parameters"):
            run(SHORT, fisher=replace(fisher, tensors=odd))
    with pytest.raises(FisherError, match="of weights"):
        run(SHORT, fisher=replace(fisher, weights="0" * 64))
    with pytest.raises(FisherError, match="above zero"):
        run(SHORT, fisher=scaled(fisher, 0.0))
    with pytest.raises(InputError, match="do not go with"):
        Examples(replay.x, replay.condition[:-1])


@pytest.mark.parametrize(
    ("name", "value"),
    [("strength", -1), ("mode", "fast"), ("without", ("surrogate",)), ("batch", 0), ("check_every", 2.5), ("speed", 1)],
)
def test_a_wrong_parameter_is_named(name: str, value: object) -> None:
    with pytest.raises(ParameterError) as refused:
        AmnesiaParameters.from_dict({name: value})

    assert refused.value.name == name
