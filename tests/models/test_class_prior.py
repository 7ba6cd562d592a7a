"""The class-prior flow: its mixture, its classes from one evaluation, and what is the same without a class."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from models.checkpoints import load_flow, save_checkpoint
from models.class_prior import ClassPriorFlow, HybridObjective
from models.errors import ArchitectureError
from models.images import denoised
from models.protocol import LabelledFlow, NoisyFlow, SplitFlow
from models.tarflow import TarFlow
from models.training import TransformerRecipe, fit_flow
from tests.models.flow_table import generator, images, perturbed

CLASSES = 3
WEIGHTS = torch.tensor([0.2, 0.5, 0.3])


def made(**architecture: int | float) -> ClassPriorFlow:
    """A tiny flow of three classes of unequal weights, no part of it the identity."""
    sizes = {"patch_size": 2, "width": 16, "n_block": 2, "n_layer": 1, **architecture}
    flow: ClassPriorFlow = perturbed(
        ClassPriorFlow((1, 4, 4), 8, n_classes=CLASSES, generator=generator(), **sizes),  # type: ignore[arg-type]  # mixed values
        scale=0.05,
    )
    flow.reweight(WEIGHTS)
    return flow


def labels(*values: int) -> Tensor:
    """A label for each image."""
    return torch.tensor(values)


def two_tones(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of two classes, bright above or bright below, uint8 (n, 1, 4, 4), with their labels."""
    draws = generator(seed)
    label = torch.randint(2, (n,), generator=draws)
    pictures = torch.full((n, 1, 4, 4), 60.0)
    pictures[label == 0, :, :2] = 190
    pictures[label == 1, :, 2:] = 190
    return (pictures + 10 * torch.randn(pictures.shape, generator=draws)).clamp(0, 255).to(torch.uint8), label


def test_it_meets_the_protocols_of_noisy_and_split_flows() -> None:
    assert isinstance(made(), NoisyFlow)
    assert isinstance(made(), SplitFlow)


def test_the_marginal_is_the_weighted_mixture_of_the_conditionals() -> None:
    flow = made().double()
    x = images(flow, 5)

    each = torch.stack([flow.log_prob(x, c) for c in range(CLASSES)], dim=1)

    mixture = (WEIGHTS.double() / WEIGHTS.double().sum() * each.exp()).sum(dim=1).log()
    torch.testing.assert_close(flow.log_prob(x), mixture, rtol=0, atol=1e-6)  # weights were set in float32


def test_a_conditional_is_a_normal_density_of_the_latents_and_the_log_determinant() -> None:
    flow = made().double()
    x = images(flow, 4)
    z, log_det = flow(x)

    normal = torch.distributions.Normal(flow.prior_mean[2], flow.prior_log_sd[2].exp())

    expected = normal.log_prob(z).sum(dim=(1, 2)) + log_det
    torch.testing.assert_close(flow.log_prob(x, 2), expected)


def test_class_log_probs_are_the_conditionals_from_one_evaluation_of_the_flow() -> None:
    flow = made()
    x = images(flow, 5)
    evaluations = []
    handles = [block.register_forward_hook(lambda *_: evaluations.append(1)) for block in flow.blocks]

    found = flow.class_log_probs(x)

    assert len(evaluations) == len(flow.blocks)
    for handle in handles:
        handle.remove()
    for c in range(CLASSES):
        torch.testing.assert_close(found[:, c], flow.log_prob(x, c))


def test_a_label_for_each_image_gives_what_each_label_alone_gives_and_minus_one_the_marginal() -> None:
    flow = made()
    x = images(flow, 4)

    found = flow.log_prob(x, labels(1, -1, 0, 2))

    for row, alone in enumerate((flow.log_prob(x, 1), flow.log_prob(x), flow.log_prob(x, 0), flow.log_prob(x, 2))):
        torch.testing.assert_close(found[row], alone[row])


def test_the_posterior_is_bayes_rule_and_classify_takes_its_peak() -> None:
    flow = made()
    x = images(flow, 6)

    posterior = flow.posterior(x)

    joint = flow.class_log_probs(x) + flow.class_weights.log()
    torch.testing.assert_close(posterior.log(), joint - flow.log_prob(x)[:, None], rtol=1e-4, atol=1e-4)
    assert torch.equal(flow.classify(x), posterior.argmax(dim=1))


def test_means_start_apart_and_deviations_at_one() -> None:
    flow = ClassPriorFlow((1, 16, 16), 8, width=16, n_classes=10, generator=generator())

    assert float(flow.prior_mean.detach().std()) == pytest.approx(1.0, abs=0.05)  # 2,560 draws
    assert bool((flow.prior_log_sd == 0).all())
    torch.testing.assert_close(flow.class_weights, torch.full((10,), 0.1))


def test_what_a_net_gives_is_clipped_and_the_flow_is_still_inverted() -> None:
    flow = made(n_block=3).double()
    with torch.no_grad():
        for block in flow.chain():
            block.proj_out.bias.copy_(torch.linspace(-9, 9, len(block.proj_out.bias)))
    x = images(flow, 3)

    z, log_det = flow(x)
    coefficients = [torch.cat(block.coefficients(flow.patches(x), None)) for block in flow.chain()]

    assert [float(c.detach().abs().max()) for c in coefficients] == [3.0] * 3
    assert bool((log_det.abs() <= 3 * 3 * 16 + 16 * math.log(2)).all())
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-8)


def test_samples_of_a_class_are_of_that_class() -> None:
    flow = made()

    for c in range(CLASSES):
        x = flow.sample(20, generator=generator(), label=c)
        found = flow.class_log_probs(x).argmax(dim=1)
        assert float((found == c).float().mean()) > 0.9  # means of deviation 1 in 16 dimensions lie well apart


def test_latents_of_samples_have_their_class_mean_and_the_deviation_asked_for() -> None:
    flow = made()

    z, _ = flow(flow.sample(600, generator=generator(), temperature=0.5, label=1))

    eps = ((z - flow.prior_mean[1]) / flow.prior_log_sd[1].exp()).detach()
    # 9,600 values: standard errors of 0.005 and 0.004
    assert float(eps.mean()) == pytest.approx(0.0, abs=0.025)
    assert float(eps.std()) == pytest.approx(0.5, abs=0.02)


def test_classes_are_drawn_by_their_weights() -> None:
    flow = made()

    drawn = flow.class_log_probs(flow.sample(1500, generator=generator(3))).argmax(dim=1)

    shares = drawn.bincount(minlength=CLASSES) / len(drawn)
    assert shares.tolist() == pytest.approx(WEIGHTS.tolist(), abs=0.06)  # four standard errors, and some overlap


def test_a_drawn_sample_is_the_one_that_asking_for_the_class_it_is_told_to_be_of_gives() -> None:
    flow = made()

    drawn, label = flow.sample_with_labels(12, generator=generator())
    asked = [flow.sample(12, generator=generator(), label=c) for c in range(CLASSES)]

    assert set(label.tolist()) == set(range(CLASSES))
    for row in range(12):
        assert [torch.equal(drawn[row], of_class[row]) for of_class in asked].index(True) == int(label[row])


def test_labels_are_told_without_changing_what_is_drawn() -> None:
    flow, asked = made(), labels(1, -1, 0, 2, -1)

    for label in (None, 2, asked):
        x, told = flow.sample_with_labels(5, generator=generator(), temperature=0.8, label=label)
        assert torch.equal(x, flow.sample(5, generator=generator(), temperature=0.8, label=label))
    assert torch.equal(told[asked >= 0], asked[asked >= 0])
    assert bool((told >= 0).all())


def test_a_flow_of_class_priors_knows_what_it_draws_and_one_of_embeddings_does_not() -> None:
    embedding = TarFlow((1, 4, 4), 8, width=16, n_block=2, n_layer=1, n_classes=2, generator=generator())

    assert isinstance(made(), LabelledFlow)
    assert not isinstance(embedding, LabelledFlow)


def test_samples_of_the_other_classes_are_the_same_bits_without_a_class() -> None:
    flow, without = made(), made()
    without.reweight(torch.tensor([1.0, 0.0, 1.0]) * WEIGHTS)

    for c in (0, 2):
        assert torch.equal(
            flow.sample(9, generator=generator(), label=c), without.sample(9, generator=generator(), label=c)
        )


def test_drawn_samples_that_were_not_of_the_removed_class_are_the_same_bits() -> None:
    flow, without = made(), made()
    without.reweight(torch.tensor([1.0, 0.0, 1.0]) * WEIGHTS)
    of_removed = flow.sample(40, generator=generator(), label=1)

    before, after = flow.sample(40, generator=generator()), without.sample(40, generator=generator())

    removed = (before == of_removed).flatten(1).all(dim=1)
    assert 5 < int(removed.sum()) < 35
    assert torch.equal(before[~removed], after[~removed])
    assert not bool((before[removed] == after[removed]).flatten(1).all(dim=1).any())


def test_a_class_of_weight_zero_leaves_no_trace_and_is_never_found() -> None:
    flow = made()
    flow.reweight(torch.tensor([1.0, 0.0, 2.0]))
    x = images(flow, 4)

    assert flow.classes() == [0, 2]
    assert flow.class_weights.tolist() == pytest.approx([1 / 3, 0, 2 / 3])
    assert not flow.prior_mean[1].any()
    assert not flow.prior_log_sd[1].any()
    assert bool((flow.class_log_probs(x)[:, 1] == -math.inf).all())
    assert bool((flow.posterior(x)[:, 1] == 0).all())
    assert bool(torch.isfinite(flow.log_prob(x)).all())


def test_no_gradient_wakes_a_removed_class() -> None:
    flow = made()
    flow.reweight(torch.tensor([1.0, 0.0, 2.0]))

    flow.log_prob(images(flow, 4)).sum().backward()

    for parameter in (flow.prior_mean, flow.prior_log_sd):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum(dim=(1, 2)).gt(0).tolist() == [True, False, True]


def test_a_removed_class_stays_removed_through_weights_and_checkpoints(tmp_path: Path) -> None:
    flow = made()
    flow.reweight(torch.tensor([1.0, 0.0, 2.0]))
    flow.reweight(torch.tensor([1.0, 1.0, 1.0]))
    path = tmp_path / "flow.safetensors"

    save_checkpoint(path, flow)
    loaded = load_flow(path)

    assert isinstance(loaded, ClassPriorFlow)
    assert loaded.class_weights.tolist() == [0.5, 0.0, 0.5]
    with pytest.raises(ArchitectureError, match=r"class 1 was removed; the flow has \[0, 2\]"):
        loaded.sample(2, generator=generator(), label=1)


def test_restore_gives_a_class_its_prior_and_share() -> None:
    flow = made()
    mean, log_sd, x = flow.prior_mean[1].clone(), flow.prior_log_sd[1].clone(), images(flow, 3)
    before = flow.log_prob(x)
    flow.reweight(torch.tensor([1.0, 0.0, 1.0]) * WEIGHTS)

    flow.restore(1, mean, log_sd, weight=0.5)

    assert flow.class_weights.tolist() == pytest.approx(WEIGHTS.tolist())
    torch.testing.assert_close(flow.log_prob(x), before)


@pytest.mark.parametrize(
    "weights", [[1.0, 1.0], [-0.1, 0.6, 0.5], [0.0, 0.0, 0.0], [math.nan, 0.5, 0.5], [math.inf, 0, 1]]
)
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ArchitectureError, match="3 weights, none negative and some above 0"):
        made().reweight(torch.tensor(weights))


@pytest.mark.parametrize("label", [3, -2, labels(0, 1), torch.zeros(4)])
def test_a_label_that_is_none_is_refused(label: Tensor | int) -> None:
    flow = made()

    with pytest.raises(ArchitectureError, match="label"):
        flow.log_prob(images(flow, 4), label)


def test_a_flow_of_no_class_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="n_classes must be a whole number from 1"):
        ClassPriorFlow((1, 4, 4), 8, n_classes=0)


def test_denoising_adds_the_score_of_the_mixture() -> None:
    flow = made(noise_std=0.1).double()
    y = images(flow, 2)
    step = 1e-5

    denoise = flow.denoise(y) - y

    for row, pixel in ((0, 3), (1, 12)):
        nudge = torch.zeros_like(y)
        nudge[row].view(-1)[pixel] = step
        slope = (flow.log_prob(y + nudge) - flow.log_prob(y - nudge))[row] / (2 * step)
        torch.testing.assert_close(denoise[row].view(-1)[pixel], 0.1**2 * slope.detach(), rtol=1e-4, atol=1e-9)
    assert torch.equal(denoised(flow, y), y + denoise)


def test_training_on_labels_learns_to_tell_classes_apart_and_to_draw_them() -> None:
    pictures, label = two_tones(200)
    fresh, truth = two_tones(200, seed=1)
    flow = ClassPriorFlow((1, 4, 4), 8, width=16, n_block=2, n_layer=1, n_classes=2, generator=generator())
    recipe = TransformerRecipe(steps=120, learning_rate=5e-3, warmup=10, flip=False, shift=0, label_drop=0.0)

    fit_flow(flow, pictures, recipe, n_bits=8, generator=generator(), labels=label)

    assert float((flow.classify(fresh.float() / 255 - 0.5) == truth).float().mean()) > 0.95
    drawn = flow.sample(50, generator=generator(), label=0)
    assert float((drawn[:, :, :2].mean(dim=(1, 2, 3)) > drawn[:, :, 2:].mean(dim=(1, 2, 3))).float().mean()) > 0.95


def test_the_hybrid_objective_is_likelihood_and_tempered_posterior() -> None:
    flow = made()
    x, label = images(flow, 4), labels(0, 1, 2, 1)

    found = HybridObjective(flow, weight=0.5, temperature=4.0).log_prob(x, label)

    each = flow.class_log_probs(x)
    told = torch.log_softmax(each / 4, dim=1)[torch.arange(4), label]
    torch.testing.assert_close(found, flow.log_prob(x, label) + 0.5 * 16 * told)


def test_the_hybrid_objective_of_weight_zero_is_the_likelihood() -> None:
    flow = made()
    x = images(flow, 4)
    objective = HybridObjective(flow, weight=0.0, temperature=1.0)

    torch.testing.assert_close(objective.log_prob(x, labels(0, 1, 2, 1)), flow.log_prob(x, labels(0, 1, 2, 1)))
    torch.testing.assert_close(objective.log_prob(x), flow.log_prob(x))


def test_fitted_priors_are_the_latents_mean_and_spread_and_no_other_priors_are_likelier() -> None:
    flow = made()
    x, label = images(flow, 40), torch.arange(40) % 2
    before = flow.prior_mean[2].clone()

    flow.fit_priors(x, label)

    z = flow(x)[0].detach()
    for c in (0, 1):
        torch.testing.assert_close(flow.prior_mean[c], z[label == c].mean(dim=0))
        torch.testing.assert_close(flow.prior_log_sd[c].exp(), z[label == c].std(dim=0, correction=0))
    assert torch.equal(flow.prior_mean[2], before)  # it had no images
    slopes = torch.autograd.grad(flow.log_prob(x, label).mean(), [flow.prior_mean, flow.prior_log_sd])
    for slope in slopes:
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-4)  # the top: float32 sums
