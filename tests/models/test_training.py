"""Training: repeatable, resumable to the bit, and right about labels, decay and what cannot be trained."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.glow import Glow
from models.tarflow import TarFlow
from models.training import (
    UNLABELLED,
    Training,
    TrainingError,
    TrainingProgress,
    TrainingRecipe,
    TransformerRecipe,
    bits_per_dim,
    fit_flow,
    image_losses,
    start,
)
from models.training_recipes import AutoencoderRecipe
from models.vae import ConditionalVAE
from tests.models.flow_table import generator

N_BITS = 5
SHAPE = (1, 8, 8)


def discs(n: int) -> Tensor:
    """n grey discs on black, uint8 (n, 1, 8, 8): simple enough to be learnt in seconds."""
    draws = generator(7)
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    centre = torch.rand(n, 2, generator=draws)[:, :, None, None] * 3 + 2
    inside = (rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2 < 6
    return (inside * torch.randint(120, 250, (n, 1, 1), generator=draws)).to(torch.uint8)[:, None]


def glow(seed: int = 0) -> Glow:
    """A small Glow, started."""
    flow = Glow(SHAPE, N_BITS, n_block=1, n_flow=4, hidden=16, affine=True, generator=generator(seed))
    start(flow, discs(64), n_bits=N_BITS, generator=generator(1))
    return flow


class Labelled(nn.Module):
    """A flow of three classes: one Gaussian each, and one for no class; it keeps the labels that it was asked with."""

    n_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4))
        self.unused = nn.Parameter(torch.ones(()))
        self.asked: list[Tensor] = []

    def log_prob(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """A unit Gaussian about the class's mean, in nats."""
        label = torch.full((len(x),), UNLABELLED) if label is None else label
        self.asked.append(label)
        mean = self.mean[label].view(-1, 1, 1, 1) + 0 * self.unused
        return -0.5 * ((x - mean) ** 2 + math.log(2 * math.pi)).sum(dim=(1, 2, 3))

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Of no class."""
        return self.mean[-1] + temperature * torch.randn(n, *SHAPE, generator=generator)


def weights(flow: nn.Module) -> dict[str, Tensor]:
    """A copy of all state."""
    return {name: value.clone() for name, value in flow.state_dict().items()}


def test_the_loss_falls_on_a_simple_set() -> None:
    flow = glow()
    before = bits_per_dim(flow, discs(64), n_bits=N_BITS, generator=generator()).mean()

    fit_flow(flow, discs(256), TrainingRecipe(steps=80, learning_rate=5e-3), n_bits=N_BITS, generator=generator())

    after = bits_per_dim(flow, discs(64), n_bits=N_BITS, generator=generator()).mean()
    assert after < before - 0.5


def test_equal_seeds_give_equal_bits() -> None:
    found = []
    for _ in range(2):
        flow = glow()
        fit_flow(flow, discs(64), TrainingRecipe(steps=10, average=0.9), n_bits=N_BITS, generator=generator(3))
        found.append(weights(flow))

    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("recipe", [TrainingRecipe(steps=12, average=0.9), TransformerRecipe(steps=12, average=0.9)])
def test_a_resumed_training_ends_with_the_bits_of_an_unbroken_one(recipe: TrainingRecipe) -> None:
    unbroken, broken = glow(), glow()
    fit_flow(unbroken, discs(64), recipe, n_bits=N_BITS, generator=generator(3))

    first = Training(broken, discs(64), recipe, n_bits=N_BITS, generator=generator(3))
    while first.steps < 5:
        first.step(first.share())
    state = first.tensors()
    fresh = glow(seed=9)
    second = Training(fresh, discs(64), recipe, n_bits=N_BITS, generator=generator(8))
    second.restore(state)
    while (share := second.share()) < 1.0:
        second.step(share)
    second.finish()

    expected, found = weights(unbroken), weights(fresh)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_labels_reach_the_flow_and_a_share_of_them_is_dropped() -> None:
    flow, labels = Labelled(), torch.arange(60) % 3
    recipe = TransformerRecipe(steps=50, batch=40, label_drop=0.25)

    fit_flow(flow, discs(60), recipe, n_bits=N_BITS, generator=generator(), labels=labels)

    asked = torch.cat(flow.asked)
    assert set(asked.tolist()) == {UNLABELLED, 0, 1, 2}
    assert float((asked == UNLABELLED).float().mean()) == pytest.approx(0.25, abs=0.03)  # 2,000 draws: 3 deviations


def test_each_class_learns_from_its_own_images() -> None:
    flow = Labelled()
    images = torch.cat([torch.full((20, *SHAPE), value, dtype=torch.uint8) for value in (0, 128, 255)])
    labels = torch.arange(3).repeat_interleave(20)

    fit_flow(
        flow, images, TransformerRecipe(steps=200, learning_rate=0.02, label_drop=0.1), n_bits=N_BITS,
        generator=generator(), labels=labels,
    )  # fmt: skip

    assert flow.mean.tolist() == pytest.approx([-0.5, 0.0, 0.5, 0.0], abs=0.06)  # noise and Adam's last steps


def test_a_plain_recipe_drops_no_label() -> None:
    flow = Labelled()

    fit_flow(flow, discs(6), TrainingRecipe(steps=5), n_bits=N_BITS, generator=generator(), labels=torch.arange(6) % 3)

    assert UNLABELLED not in torch.cat(flow.asked).tolist()


@pytest.mark.parametrize(("recipe", "shrinks"), [(TrainingRecipe, False), (TransformerRecipe, True)])
def test_weights_decay_where_the_recipe_says(recipe: Callable[..., TrainingRecipe], shrinks: bool) -> None:
    flow = Labelled()

    fit_flow(flow, discs(6), recipe(steps=20, warmup=1, learning_rate=0.1), n_bits=N_BITS, generator=generator())

    assert (float(flow.unused.detach()) < 1) == shrinks  # its gradient is 0


def test_likelihoods_stay_float32_where_matrix_products_run_in_bfloat16() -> None:
    flow = TarFlow(SHAPE, 8, patch_size=2, width=32, n_block=2, n_layer=1, generator=generator())
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(1)))
    x = torch.rand(4, *SHAPE, generator=generator(2)) - 0.5

    with torch.autocast("cpu", dtype=torch.bfloat16):  # what the recipe's bf16 does on a GPU
        found = flow.log_prob(x)
    found.mean().backward()

    assert found.dtype == torch.float32
    bits = (found - flow.log_prob(x)).detach().abs().max() / (math.prod(SHAPE) * math.log(2))
    assert float(bits) < 2e-3  # bits per dimension; bfloat16 has 8 bits of mantissa
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in flow.parameters())


def test_the_learning_rate_rises_then_falls() -> None:
    flow = Labelled()
    training = Training(
        flow, discs(6), TransformerRecipe(steps=100, warmup=10, flip=False), n_bits=N_BITS, generator=generator()
    )
    moved = []
    while (share := training.share()) < 1.0:
        before = flow.mean.detach().clone()
        training.step(share)
        moved.append(float((flow.mean.detach() - before).abs().max()))

    assert moved[0] < moved[8] / 4
    assert moved[-1] < moved[20] / 4


def test_start_sets_what_depends_on_data() -> None:
    flow = Glow(SHAPE, N_BITS, n_block=1, n_flow=1, hidden=4, generator=generator())

    start(flow, discs(16), n_bits=N_BITS, generator=generator())

    assert int(flow.blocks[0].flows[0].actnorm.initialized) == 1


def test_start_leaves_a_flow_without_one_alone() -> None:
    flow = Labelled()
    before = weights(flow)

    start(flow, discs(16), n_bits=N_BITS, generator=generator())

    assert all(torch.equal(before[name], value) for name, value in flow.state_dict().items())


def test_reports_tell_step_and_bits() -> None:
    reports: list[TrainingProgress] = []

    last = fit_flow(
        glow(), discs(32), TrainingRecipe(steps=10), n_bits=N_BITS, generator=generator(), callback=reports.append,
        report_every=5,
    )  # fmt: skip

    assert [report.step for report in reports] == [5, 10]
    assert reports[-1].bits_per_dim == last


def test_a_time_budget_ends_it() -> None:
    recipe = TrainingRecipe(steps=None, seconds=0.3)
    training = Training(glow(), discs(32), recipe, n_bits=N_BITS, generator=generator())

    while (share := training.share()) < 1.0:
        training.step(share)

    assert training.steps >= 1
    assert training.elapsed() >= 0.3


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3]), "0 to 2"),
        (torch.tensor([0, 1, -1]), "0 to 2"),
        (torch.tensor([0, 1]), r"\(3,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), "int64"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        fit_flow(Labelled(), discs(3), TrainingRecipe(steps=1), n_bits=N_BITS, generator=generator(), labels=labels)


def test_a_flow_without_classes_takes_no_labels() -> None:
    with pytest.raises(TrainingError, match="no classes"):
        fit_flow(
            glow(),
            discs(3),
            TrainingRecipe(steps=1),
            n_bits=N_BITS,
            generator=generator(),
            labels=torch.zeros(3).long(),
        )


def test_an_unbounded_recipe_is_refused() -> None:
    with pytest.raises(TrainingError, match="bound"):
        fit_flow(glow(), discs(3), TrainingRecipe(steps=None), n_bits=N_BITS, generator=generator())


def test_what_is_no_flow_is_refused() -> None:
    with pytest.raises(TrainingError, match="no flow"):
        fit_flow(nn.Linear(2, 2), discs(3), TrainingRecipe(steps=1), n_bits=N_BITS, generator=generator())


def test_a_loss_that_stays_lost_ends_the_training() -> None:
    flow = Labelled()
    with torch.no_grad():
        flow.mean.fill_(torch.nan)

    with pytest.raises(TrainingError, match="lower the learning rate"):
        fit_flow(flow, discs(3), TrainingRecipe(steps=50), n_bits=N_BITS, generator=generator())


def vae(seed: int = 0) -> ConditionalVAE:
    """A small VAE of two classes."""
    return ConditionalVAE(SHAPE, n_classes=2, hidden=(24, 12), latent=2, generator=generator(seed))


def bright_or_dark(images: Tensor) -> Tensor:
    """A class that can be seen."""
    means = images.float().mean(dim=(1, 2, 3))
    return (means > means.median()).long()


VAE_RECIPE = AutoencoderRecipe(steps=60, learning_rate=5e-3, flip=False, shift=0, turn=5.0, zoom=0.1, kl_weight=2.0)


def test_a_vae_learns_and_reports_its_loss_in_nats() -> None:
    images, model, reports = discs(128), vae(), list[TrainingProgress]()
    labels = bright_or_dark(images)
    before = image_losses(model, images, labels, generator=generator()).mean()

    fit_flow(model, images, VAE_RECIPE, n_bits=8, generator=generator(), labels=labels, callback=reports.append)

    after = image_losses(model, images, labels, generator=generator()).mean()
    assert after < before - 5
    assert reports[-1].loss < reports[0].loss
    assert reports[-1].loss == pytest.approx(reports[-1].bits_per_dim * 64 * math.log(2))


def test_a_flow_reports_the_same_in_both_units() -> None:
    training = Training(glow(), discs(64), TrainingRecipe(steps=3), n_bits=N_BITS, generator=generator())

    training.step(0.0)

    progress = training.progress(0.0)
    assert progress.loss == pytest.approx((progress.bits_per_dim - N_BITS) * 64 * math.log(2))


def test_the_losses_of_images_do_not_depend_on_batches() -> None:
    images, model = discs(20), vae()
    labels = bright_or_dark(images)

    # draws come in the order of the images, and a row's loss is its own up to the order of sums
    parts = [image_losses(model, images, labels, generator=generator(), batch=size) for size in (20, 7)]

    torch.testing.assert_close(parts[0], parts[1])


def test_a_vae_that_is_taken_up_again_ends_at_the_same_bits() -> None:
    images = discs(64)
    labels = bright_or_dark(images)

    def begun(model: nn.Module) -> Training:
        return Training(model, images, VAE_RECIPE, n_bits=8, generator=generator(3), labels=labels)

    whole, first, second = vae(), vae(), vae(seed=9)
    training, half = begun(whole), begun(first)
    for step in range(10):
        training.step(step / 60)
        if step < 5:
            half.step(step / 60)
    other = begun(second)
    other.restore(half.tensors())
    for step in range(5, 10):
        other.step(step / 60)

    assert all(torch.equal(value, second.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_weight_of_the_divergence_falls_from_the_middle_on() -> None:
    recipe = AutoencoderRecipe(kl_weight=3.0, kl_final=1.0)

    assert [recipe.kl(share) for share in (0.0, 0.5, 0.75, 1.0, 1.5)] == [3.0, 3.0, 2.0, 1.0, 1.0]


def test_more_weight_on_the_divergence_leaves_less_of_it() -> None:
    images = discs(128)
    labels = bright_or_dark(images)
    found = []
    for weight in (1.0, 8.0):
        model = vae()
        recipe = replace(VAE_RECIPE, steps=150, kl_weight=weight, kl_final=weight)
        fit_flow(model, images, recipe, n_bits=8, generator=generator(), labels=labels)
        x = model.encode(images, generator=generator())
        divergence = model.parts(x, labels, model.draw(128, generator=generator()))[1]
        found.append(float(divergence.detach().mean()))

    assert found[1] < found[0] / 2


def test_a_vae_without_labels_is_refused() -> None:
    with pytest.raises(TrainingError, match="give the label of each"):
        Training(vae(), discs(8), VAE_RECIPE, n_bits=8, generator=generator())
