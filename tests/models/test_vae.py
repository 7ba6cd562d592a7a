"""The conditional VAE: its bound is the bound, its draws are given, its conditions matter, its file gives it back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal, kl_divergence

from models.checkpoints import load_checkpoint, load_conditional, load_flow, read_manifest, save_checkpoint
from models.conditional import NO_CONDITION, CheckpointedConditional, ClassConditional
from models.errors import ArchitectureError, ImageError, ManifestError, ModelError, WrongKindError
from models.protocol import Flow
from models.vae import ConditionalVAE, ConditionError, InputError
from tests.models.flow_table import generator

CLASSES = 3
SHAPES = [(1, 4, 4), (3, 4, 6)]


def vae(shape: tuple[int, int, int] = (1, 4, 4), n_bits: int = 8, seed: int = 0, scale: float = 1.5) -> ConditionalVAE:
    """A small one whose every parameter, biases too, is somewhere."""
    model = ConditionalVAE(shape, n_bits, n_classes=CLASSES, hidden=(12, 9), latent=2, generator=generator(seed))
    draws = generator(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale).add_(0.1 * torch.randn(p.shape, generator=draws))
    return model


def rows(model: ConditionalVAE, n: int, seed: int = 3) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x, labels and draws of n rows."""
    draws = generator(seed)
    x = torch.rand(n, math.prod(model.image_shape), generator=draws)
    return x, torch.randint(CLASSES, (n,), generator=draws), model.draw(n, generator=draws)


def one_hot(labels: Tensor) -> Tensor:
    return torch.eye(CLASSES)[labels]


def by_distributions(model: ConditionalVAE, x: Tensor, labels: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x | z, c) and KL(q || N(0, I)) of each row, by plain matrices and torch's distributions."""

    def through(part: str, h: Tensor) -> Tensor:
        weights = dict(model.named_parameters())
        for layer in range(3):
            h = h @ weights[f"{part}.{layer}.weight"].T + weights[f"{part}.{layer}.bias"]
            h = h.clamp(min=0) if layer < 2 else h
        return h

    found = through("encoder", torch.cat([x, one_hot(labels)], dim=1))
    q = Normal(found[:, : model.latent], (found[:, model.latent :] / 2).exp())
    z = q.loc + q.scale * eps
    white = Bernoulli(logits=through("decoder", torch.cat([z, one_hot(labels)], dim=1)), validate_args=False)
    return white.log_prob(x).sum(1), kl_divergence(q, Normal(0.0, 1.0)).sum(1)


def test_it_is_a_class_conditional_model_and_no_flow() -> None:
    model = vae()

    assert isinstance(model, ClassConditional)
    assert isinstance(model, CheckpointedConditional)
    assert not isinstance(model, Flow)


def test_the_papers_sizes_have_the_papers_number_of_parameters() -> None:
    model = ConditionalVAE((1, 28, 28), n_classes=10)

    assert sum(p.numel() for p in model.parameters()) == 1_081_120


@pytest.mark.parametrize("shape", SHAPES)
def test_the_losses_are_the_negative_bound_by_distributions(shape: tuple[int, int, int]) -> None:
    model = vae(shape)
    x, labels, draws = rows(model, 7)

    likelihood, divergence = by_distributions(model, x, labels, draws[0])

    losses = model.losses(x, labels, draws)
    assert losses.shape == (7,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, divergence - likelihood)
    torch.testing.assert_close(model.parts(x, labels, draws)[1], divergence)


def test_each_loss_is_independent_of_its_batch_mates() -> None:
    model = vae()
    x, labels, draws = rows(model, 9)

    alone = [model.losses(x[i : i + 1], labels[i : i + 1], (draws[0][i : i + 1],)) for i in range(9)]

    # another number of rows may add up in another order
    torch.testing.assert_close(model.losses(x, labels, draws), torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter_and_are_those_of_differences() -> None:
    model = vae(scale=1.0).double()
    x, labels, (eps,) = rows(model, 16)
    x, eps = x.double(), eps.double()
    model.losses(x, labels, (eps,)).sum().backward()

    for name, p in model.named_parameters():
        assert p.grad is not None, name
        index = int(p.grad.abs().argmax())
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                p.view(-1)[index] += step
                ends.append(float(model.losses(x, labels, (eps,)).sum()))
                p.view(-1)[index] -= step
        assert float(p.grad.view(-1)[index]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4), name
        assert float(p.grad.view(-1)[index]) != 0, name


def test_the_divergence_is_zero_where_the_encoder_says_the_prior() -> None:
    model = vae()
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
        model.encoder[-1].bias.zero_()
    x, labels, draws = rows(model, 5)

    reconstruction, divergence = model.parts(x, labels, draws)

    assert divergence.tolist() == [0.0] * 5
    assert torch.equal(model.losses(x, labels, draws), reconstruction)


def test_a_bound_by_importance_weights_is_no_worse_in_the_mean() -> None:
    model, n, draws_a_row = vae(), 6, 400
    x, labels, _ = rows(model, n)
    x, labels = (part.repeat_interleave(draws_a_row, dim=0) for part in (x, labels))
    eps = torch.randn(len(x), model.latent, generator=generator(9))
    with torch.no_grad():
        mean, log_variance = model.posterior(x, labels)
        z = mean + (0.5 * log_variance).exp() * eps
        likelihood = Bernoulli(logits=model.logits(z, labels), validate_args=False).log_prob(x).sum(1)
        ratio = Normal(0.0, 1.0).log_prob(z) - Normal(mean, (0.5 * log_variance).exp()).log_prob(z)
        weighted = (likelihood + ratio.sum(1)).view(n, draws_a_row).logsumexp(1) - math.log(draws_a_row)
        bound = -model.losses(x, labels, (eps,)).view(n, draws_a_row).mean(1)

    assert bool((weighted > bound).all())


@pytest.mark.parametrize("n_bits", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_images_survive_encoding_up_to_the_colour_depth(shape: tuple[int, int, int], n_bits: int) -> None:
    model = vae(shape, n_bits)
    images = torch.randint(256, (20, *shape), generator=generator()).to(torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    levels = images // 2 ** (8 - n_bits)

    x = model.encode(images, generator=generator())

    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert torch.equal(model.images(x) // 2 ** (8 - n_bits), levels)
    assert torch.equal(model.encode(model.images(x), generator=generator()), x)


def test_samples_are_the_decoders_means_and_given_by_the_generator() -> None:
    model = vae()
    labels = torch.arange(CLASSES).repeat(2)

    first, again, other = (model.sample(labels, generator=generator(seed)) for seed in (1, 1, 2))

    (z,) = model.draw(6, generator=generator(1))
    assert (first.shape, first.dtype) == ((6, 1, 4, 4), torch.uint8)
    assert torch.equal(first, (model.decode(z, labels) * 255).round().to(torch.uint8).view(6, 1, 4, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_is_drawn_leaves_global_randomness_alone() -> None:
    before = torch.get_rng_state()
    model = vae()
    torch.set_rng_state(before)

    model.sample(torch.tensor([0]), generator=generator())
    model.losses(*rows(model, 2))

    assert torch.equal(torch.get_rng_state(), before)


def test_conditions_matter_to_both_halves() -> None:
    model = vae()
    x, _, draws = rows(model, 5)
    first, second = (torch.full((5,), label) for label in (0, 1))

    assert not bool((model.posterior(x, first)[0] == model.posterior(x, second)[0]).any())
    assert not bool((model.decode(draws[0], first) == model.decode(draws[0], second)).any())


def test_the_decoder_is_a_scope_of_its_own_and_all_that_samples_depend_on() -> None:
    model, labels = vae(), torch.tensor([0, 1])
    before = model.sample(labels, generator=generator())
    scopes = model.scopes()

    with torch.no_grad():
        for name, p in model.named_parameters():
            if name not in scopes["decoder"]:
                p.add_(1.0)

    assert list(scopes["all"]) == [name for name, _ in model.named_parameters()]
    assert 0 < len(scopes["decoder"]) < len(scopes["all"])
    assert torch.equal(model.sample(labels, generator=generator()), before)


def test_every_layer_is_linear_over_rows_and_applied_once_a_pass() -> None:
    model = vae()
    seen: list[str] = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            assert isinstance(module, torch.nn.Linear)
            module.register_forward_hook(lambda _module, args, _out, name=name: seen.append(f"{name} {args[0].ndim}"))

    model.losses(*rows(model, 4))

    assert seen == [f"{part}.{layer} 2" for part in ("encoder", "decoder") for layer in range(3)]


def test_a_checkpoint_gives_back_the_same_bits(tmp_path: Path) -> None:
    model, path = vae(n_bits=5), tmp_path / "vae.safetensors"

    save_checkpoint(path, model, {"note": "tiny"})

    loaded, manifest = load_conditional(path), read_manifest(path)
    assert isinstance(loaded, ConditionalVAE)
    assert (manifest.family, manifest.n_bits, manifest.image_shape) == ("vae", 5, (1, 4, 4))
    assert manifest.architecture == {"hidden": [12, 9], "latent": 2, "n_classes": 3} == loaded.architecture
    assert torch.equal(loaded.losses(*rows(model, 4)), model.losses(*rows(model, 4)))


def test_a_vae_is_no_flow_to_those_who_ask_for_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "vae.safetensors", vae())

    with pytest.raises(WrongKindError, match=r"family 'vae'.*exact likelihoods: class-prior, glow"):
        load_flow(tmp_path / "vae.safetensors")


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("hidden", ["wide"], ArchitectureError),
        ("hidden", [], ArchitectureError),
        ("hidden", [10**6], ArchitectureError),
        ("hidden", 12, ManifestError),
        ("latent", 0, ArchitectureError),
        ("n_classes", 0, ArchitectureError),
        ("n_classes", None, ManifestError),
    ],
)
def test_a_manifest_that_lies_builds_nothing(field: str, value: object, error: type[Exception], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from models.checkpoints import METADATA_KEY

    path, lie = tmp_path / "vae.safetensors", tmp_path / "lie.safetensors"
    manifest = save_checkpoint(path, vae())
    manifest.architecture[field] = value
    save_file(load_file(path), lie, metadata={METADATA_KEY: manifest.to_json()})

    with pytest.raises(error, match=field):
        load_checkpoint(lie)


def with_label(label: int) -> Callable[[ConditionalVAE], object]:
    return lambda model: model.sample(torch.tensor([0, label]), generator=generator())


REFUSED: list[tuple[Callable[[ConditionalVAE], object], type[ModelError], str]] = [
    (with_label(NO_CONDITION), ConditionError, "no unconditional branch"),
    (with_label(CLASSES), ConditionError, "no class 3; labels run from 0 to 2"),
    (with_label(-2), ConditionError, "no class -2"),
    (lambda m: m.decode(torch.zeros(2, 2), torch.zeros(2)), ConditionError, "int64"),
    (lambda m: m.decode(torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64)), ConditionError, r"\(2,\)"),
    (lambda m: m.decode(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), InputError, r"\(n, 2\)"),
    (lambda m: m.decode(torch.full((1, 2), math.nan), torch.tensor([0])), InputError, "NaN"),
    (lambda m: m.losses(torch.full((1, 16), math.nan), torch.tensor([0]), (torch.zeros(1, 2),)), InputError, "NaN"),
    (lambda m: m.losses(torch.full((1, 16), 1.5), torch.tensor([0]), (torch.zeros(1, 2),)), InputError, "outside"),
    (lambda m: m.losses(torch.zeros(1, 1, 4, 4), torch.tensor([0]), (torch.zeros(1, 2),)), InputError, r"\(n, 16\)"),
    (lambda m: m.losses(torch.zeros(1, 16), torch.tensor([0]), (torch.zeros(2, 2),)), InputError, r"\(1, 2\)"),
    (lambda m: m.encode(torch.zeros(1, 1, 4, 4), generator=generator()), ImageError, "uint8"),
    (lambda m: m.encode(torch.zeros(1, 1, 5, 4, dtype=torch.uint8), generator=generator()), ImageError, "1, 4, 4"),
]


@pytest.mark.parametrize(("ask", "error", "message"), REFUSED)
def test_odd_input_is_refused_with_the_value(
    ask: Callable[[ConditionalVAE], object], error: type[ModelError], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(vae())
