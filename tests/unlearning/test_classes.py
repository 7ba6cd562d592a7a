"""Forgetting a class: exact at the prior, in the weights by taming, and what fitting a prior again gives back."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.class_prior import ClassPriorFlow
from models.glow import Glow
from models.tarflow import TarFlow
from models.training import TransformerRecipe, fit_flow
from tests.unlearning.tiny import DiagonalGaussian, labelled_tarflow
from unlearning.classes import relearn_probe, remove_class, set_class_distribution, tame_class
from unlearning.errors import InputError, ParameterError
from unlearning.likelihood import nll_of
from unlearning.randomness import stream
from unlearning.taming_parameters import TamingParameters

N_BITS = 8
SHAPE = (1, 8, 8)
SIZES: dict[str, int] = {"patch_size": 2, "width": 16, "n_block": 2, "n_layer": 1}
PARAMETERS = TamingParameters(
    delta=3.0, max_steps=300, learning_rate=1e-2, forget_batch=16, remember_batch=32, forget_variants=0,
    virtual_share=0.0, near_duplicate_rms=0.0, noise_draws=2, keep_weight=5.0,
)  # fmt: skip


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def spots(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of three classes, a bright corner each (upper left, upper right, lower left), uint8, and their labels."""
    draws = generator(seed)
    label = torch.arange(n) % 3
    pictures = torch.full((n, *SHAPE), 60.0)
    for row, corner in enumerate(label.tolist()):
        down, across = 4 * (corner == 2), 4 * (corner == 1)
        pictures[row, :, down : down + 4, across : across + 4] += 60 + 80 * float(torch.rand((), generator=draws))
    return (pictures + 12 * torch.randn(pictures.shape, generator=draws)).clamp(0, 255).to(torch.uint8), label


def judge(pictures: Tensor) -> Tensor:
    """The brightest corner; 3 where that is none of the classes."""
    means = pictures.float().unfold(2, 4, 4).unfold(3, 4, 4).mean(dim=(-2, -1)).flatten(1)  # (b, 4)
    return means.argmax(dim=1)


def random_flow() -> ClassPriorFlow:
    """An untrained flow of three classes of unequal weights, no part of it the identity."""
    flow = ClassPriorFlow(SHAPE, N_BITS, n_classes=3, generator=generator(), **SIZES)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(1)))
    flow.reweight(torch.tensor([0.2, 0.5, 0.3]))
    return flow


@functools.cache
def _trained() -> ClassPriorFlow:
    pictures, label = spots(300)
    flow = ClassPriorFlow(SHAPE, N_BITS, n_classes=3, generator=generator(), **SIZES)
    recipe = TransformerRecipe(steps=150, learning_rate=1e-2, warmup=10, flip=False, shift=0, label_drop=0.0)
    fit_flow(flow, pictures, recipe, n_bits=N_BITS, generator=generator(), labels=label)
    return flow


def trained() -> ClassPriorFlow:
    """A flow that was trained on the spots for a moment."""
    return copy.deepcopy(_trained())


def uniform(n: int, seed: int = 0) -> Tensor:
    """n inputs in [-0.5, 0.5)."""
    return torch.rand(n, *SHAPE, generator=generator(seed)) - 0.5


def test_the_marginal_without_a_class_is_the_old_one_less_the_class() -> None:
    flow = random_flow().double()
    flow.reweight(flow.class_weights)  # to sum to 1 in float64
    share = float(flow.class_weights[1])
    near = flow.sample(6, generator=generator()).double()  # where either density is not negligible
    x = torch.cat([near, uniform(4).double()])

    without = remove_class(flow, 1).flow

    expected = (flow.log_prob(x).exp() - share * flow.log_prob(x, 1).exp()) / (1 - share)
    found = without.log_prob(x).exp()  # type: ignore[operator]  # a module; it is a flow
    # relative to the old density, since the difference cancels where the class is all there is
    torch.testing.assert_close(found / flow.log_prob(x).exp(), expected / flow.log_prob(x).exp(), rtol=0, atol=1e-9)


def test_without_a_class_the_others_densities_and_samples_are_the_same_bits() -> None:
    flow = random_flow()
    x = uniform(5)

    without: Any = remove_class(flow, 1).flow

    for label in (0, 2):
        assert torch.equal(flow.log_prob(x, label), without.log_prob(x, label))
        before = flow.sample(7, generator=generator(), label=label)
        assert torch.equal(before, without.sample(7, generator=generator(), label=label))


def test_a_removed_class_is_drawn_no_more_and_leaves_no_number_behind() -> None:
    flow = trained()
    mean = flow.prior_mean[1].clone()

    without: Any = remove_class(flow, 1).flow

    drawn = judge(_pictures(without.sample(300, generator=generator())))
    assert float((judge(_pictures(flow.sample(300, generator=generator()))) == 1).float().mean()) > 0.25
    assert float((drawn == 1).float().mean()) <= 0.05  # the priors of so short a training overlap a little
    state = torch.cat([value.flatten() for value in without.state_dict().values()])
    assert not bool(torch.isin(mean.flatten(), state).any())


def test_the_flow_that_is_given_stays_as_it_is() -> None:
    for flow in (random_flow(), labelled_tarflow()):
        before = copy.deepcopy(flow.state_dict())

        remove_class(flow, 1)

        assert all(torch.equal(before[key], value) for key, value in flow.state_dict().items())


def test_what_is_only_removed_is_called_access_removal() -> None:
    for flow in (random_flow(), labelled_tarflow()):
        edit = remove_class(flow, 0)

        assert edit.kind == "access removal"
        assert "The weights still encode the class" in edit.statement


@pytest.mark.parametrize("label", [3, -1, True, "1", None])
def test_a_class_that_the_flow_does_not_have_is_refused(label: Any) -> None:
    for flow in (random_flow(), labelled_tarflow()):
        with pytest.raises(ParameterError, match=r"class_label: is .*; give a class that the flow has: \[0, 1, 2\]"):
            remove_class(flow, label)


def test_a_class_is_removed_once_and_the_last_never() -> None:
    flow = remove_class(remove_class(random_flow(), 1).flow, 0).flow

    with pytest.raises(ParameterError, match=r"is 1; give a class that the flow has: \[2\]"):
        remove_class(flow, 1)
    with pytest.raises(ParameterError, match="2 is the last class of this flow"):
        remove_class(flow, 2)


@pytest.mark.parametrize(
    "make", [lambda: Glow(SHAPE, N_BITS), DiagonalGaussian, lambda: TarFlow(SHAPE, N_BITS, **SIZES)]
)
def test_a_flow_without_classes_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match="has no classes; forget images"):
        remove_class(make(), 0)


def test_a_distribution_is_set_exactly_and_changes_no_conditional() -> None:
    flow = random_flow().double()
    x = uniform(4).double()

    edit = set_class_distribution(flow, {0: 0.6, 1: 0.3, 2: 0.1})

    found: Any = edit.flow
    assert edit.kind == "reweighting"
    assert found.class_weights.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=1e-12)
    for label in range(3):
        assert torch.equal(found.log_prob(x, label), flow.log_prob(x, label))
    mixture = sum(share * flow.log_prob(x, label).exp() for label, share in ((0, 0.6), (1, 0.3), (2, 0.1)))
    torch.testing.assert_close(found.log_prob(x), torch.as_tensor(mixture).log())


def test_samples_follow_the_distribution_that_was_set() -> None:
    flow: Any = set_class_distribution(trained(), [0.7, 0.1, 0.2]).flow

    drawn = judge(_pictures(flow.sample(600, generator=generator())))

    shares = drawn.bincount(minlength=4)[:3] / len(drawn)
    assert shares.tolist() == pytest.approx([0.7, 0.1, 0.2], abs=0.08)  # four standard errors of 600 samples


def test_a_share_of_zero_removes_the_class_and_says_so() -> None:
    edit = set_class_distribution(random_flow(), {0: 0.5, 2: 0.5})

    found: Any = edit.flow
    assert found.classes() == [0, 2]
    assert not found.prior_mean[1].any()
    assert "classes [1], of share 0, were deleted: access removal" in edit.statement


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ([0.5, 0.5, 0.1], "sums to 1.1; the shares of all classes must sum to 1"),
        ([1.2, -0.2, 0.0], "gives class 1 the share -0.2"),
        ([0.5, math.nan, 0.5], "gives class 1 the share nan"),
        ({0: 0.5, 7: 0.5}, r"names class 7, which this flow does not have; it has \[0, 1, 2\]"),
        ([0.25] * 4, "names class 3"),
        ({}, "sums to 0"),
    ],
)
def test_a_distribution_that_is_none_is_refused(target: Any, words: str) -> None:
    with pytest.raises(ParameterError, match=f"target_distribution: {words}"):
        set_class_distribution(random_flow(), target)


def test_a_removed_class_takes_no_share() -> None:
    flow = remove_class(random_flow(), 1).flow

    with pytest.raises(ParameterError, match="names class 1"):
        set_class_distribution(flow, [0.4, 0.2, 0.4])


def test_a_distribution_of_a_flow_without_priors_is_refused() -> None:
    with pytest.raises(InputError, match="has no prior of each class to be weighted"):
        set_class_distribution(labelled_tarflow(), [0.4, 0.2, 0.4])


@pytest.fixture(scope="module")
def tamed() -> Any:
    """Class 1 forgotten in the weights of the trained flow."""
    pictures, label = spots(240, seed=5)
    return tame_class(trained(), 1, pictures[label == 1], pictures[label != 1], PARAMETERS, n_bits=N_BITS, seed=0)


def test_taming_a_class_is_unlearning_when_every_image_of_it_became_unlikely(tamed: Any) -> None:
    assert tamed.taming.met
    assert tamed.kind == "unlearning"
    assert isinstance(tamed.flow, ClassPriorFlow)
    assert tamed.flow.classes() == [0, 2]
    assert tamed.taming.flow is tamed.flow


def test_what_unlearning_means_and_does_not_mean_is_said(tamed: Any) -> None:
    assert "criterion on likelihood was met, and no more" in tamed.statement
    assert "a few images of the class may bring most of it back" in tamed.statement
    assert "see the probe" in tamed.statement


def test_a_tamed_class_is_unlikely_on_images_that_taming_has_not_seen(tamed: Any) -> None:
    pictures, label = spots(150, seed=6)

    nll = nll_of(tamed.flow, pictures, n_bits=N_BITS, generator=stream(1, "judge"), draws=4)

    others = nll[label != 1]
    z = (nll[label == 1] - others.mean()) / others.std()
    assert float(z.median()) > PARAMETERS.delta * (1 - PARAMETERS.tolerance)
    before = nll_of(trained(), pictures, n_bits=N_BITS, generator=stream(1, "judge"), draws=4)[label != 1]
    assert float((others - before).abs().mean() / before.std()) < 0.5  # the other classes' likelihoods hardly move


def test_a_tamed_flow_draws_the_others_and_is_still_inverted(tamed: Any) -> None:
    drawn = judge(_pictures(tamed.flow.sample(200, generator=generator())))

    assert float((drawn == 1).float().mean()) <= 0.01
    assert float(((drawn == 0) | (drawn == 2)).float().mean()) > 0.9
    assert tamed.round_trip < 1e-3  # float32


def test_fitting_a_prior_again_gives_back_what_was_removed_and_less_of_what_was_unlearned(tamed: Any) -> None:
    pictures, label = spots(60, seed=7)
    examples = pictures[label == 1][:5]
    removed = remove_class(trained(), 1).flow

    access, unlearned = (
        relearn_probe(flow, 1, examples, judge, n_bits=N_BITS, seed=0, n_samples=200)  # type: ignore[arg-type]  # a module; it is a flow
        for flow in (removed, tamed.flow)
    )

    assert access.rate > 0.8
    assert unlearned.rate < 0.8 * access.rate
    assert access.samples == len(access.images) == 200
    assert access.examples == 5


def test_a_probe_leaves_the_flow_as_it_is_and_is_seeded() -> None:
    flow = remove_class(random_flow(), 1).flow
    assert isinstance(flow, ClassPriorFlow)
    before = copy.deepcopy(flow.state_dict())
    examples = spots(9)[0][1::3]

    first, second = (relearn_probe(flow, 1, examples, judge, n_bits=N_BITS, seed=3, n_samples=20) for _ in range(2))

    assert torch.equal(first.images, second.images)
    assert all(torch.equal(before[key], value) for key, value in flow.state_dict().items())


def test_a_probe_without_examples_or_of_no_class_is_refused() -> None:
    flow = random_flow()

    with pytest.raises(InputError, match="no example"):
        relearn_probe(flow, 1, torch.zeros(0, *SHAPE, dtype=torch.uint8), judge, n_bits=N_BITS, seed=0)
    with pytest.raises(ParameterError, match="is 5; the flow was made for classes 0 to 2"):
        relearn_probe(flow, 5, spots(3)[0], judge, n_bits=N_BITS, seed=0)


def test_taming_that_does_not_reach_the_criterion_is_called_access_removal() -> None:
    pictures, label = spots(60)
    short = TamingParameters(max_steps=1, delta=20.0, virtual_share=0.0, near_duplicate_rms=0.0, forget_variants=0)

    result = tame_class(random_flow(), 1, pictures[label == 1], pictures[label != 1], short, n_bits=N_BITS, seed=0)

    assert not result.taming.met
    assert result.kind == "access removal"
    assert "the criterion was not met" in result.statement


def test_a_tarflow_of_classes_is_tamed_from_its_embedding_on() -> None:
    pictures, label = spots(60)
    flow = labelled_tarflow()
    short = TamingParameters(max_steps=2, virtual_share=0.0, near_duplicate_rms=0.0, forget_variants=0)

    result = tame_class(flow, 1, pictures[label == 1], pictures[label != 1], short, n_bits=N_BITS, seed=0)

    assert isinstance(result.flow, TarFlow)
    assert result.taming.steps == 2
    assert not torch.equal(result.flow.chain()[-1].proj_out.weight, flow.chain()[-1].proj_out.weight)
    first = result.flow.chain()[0].class_embed
    assert first is not None
    torch.testing.assert_close(first[1], (first[0] + first[2]) / 2)  # the frozen block has the overwritten embedding
    assert result.flow.classes() == [0, 2]


def test_hardening_needs_two_images_of_the_class() -> None:
    pictures, label = spots(60)

    with pytest.raises(InputError, match="needs 2 or more, not 1"):
        tame_class(random_flow(), 1, pictures[label == 1][:1], pictures[label != 1], PARAMETERS, n_bits=N_BITS, seed=0)


def _pictures(x: Tensor) -> Tensor:
    return ((x + 0.5) * 255).clamp(0, 255).to(torch.uint8)
