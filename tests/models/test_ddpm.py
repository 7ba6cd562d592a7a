"""The class-conditional DDPM: its loss is the process's, draws are given, classes guide, its file gives it back."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.checkpoints import load_checkpoint, load_conditional, read_manifest, save_checkpoint
from models.conditional import (
    NO_CONDITION,
    CheckpointedConditional,
    ClassConditional,
    Draws,
    GuidedConditional,
    PromptConditional,
    Sampling,
    StratifiedConditional,
)
from models.ddpm import ClassDDPM
from models.errors import ArchitectureError, ImageError, ManifestError, ModelError
from models.protocol import Flow
from models.vae import ConditionError, InputError
from tests.models.flow_table import generator

CLASSES, TERMS = 3, 40
SIZES: dict[str, Any] = {
    "channels": [8, 16], "layers": 1, "attention": [False, True], "n_classes": CLASSES, "norm_groups": 4,
    "scheduler": {"num_train_timesteps": TERMS, "beta_end": 0.3}, "sampling": {"steps": 5, "guidance_scale": 2.0},
}  # fmt: skip


def ddpm(shape: tuple[int, int, int] = (1, 8, 8), n_bits: int = 8, seed: int = 0, **sizes: Any) -> ClassDDPM:
    """A small one whose every parameter is somewhere: a fresh one's last layer is zero."""
    model = ClassDDPM(shape, n_bits, **{**SIZES, **sizes}, generator=generator(seed))
    draws = generator(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draws))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> ClassDDPM:
    """One that no test changes."""
    return ddpm()


def rows(model: ClassDDPM, n: int, seed: int = 3) -> tuple[Tensor, Tensor, Draws]:
    """x, labels and draws of n rows; some labels are none."""
    draws = generator(seed)
    x = torch.rand(n, *model.image_shape, generator=draws) * 2 - 1
    return x, torch.randint(-1, CLASSES, (n,), generator=draws), model.draw(n, generator=draws)


def some(draws: Draws, index: slice) -> Draws:
    return tuple(part[index] for part in draws)


def test_it_is_a_guided_model_of_classes_and_no_flow(model: ClassDDPM) -> None:
    for kind in (StratifiedConditional, GuidedConditional, ClassConditional, CheckpointedConditional):
        assert isinstance(model, kind)
    assert not isinstance(model, PromptConditional | Flow)


def test_its_state_is_weights_alone(model: ClassDDPM) -> None:
    assert [name for name, _ in model.named_buffers()] == []
    assert all(name.startswith("unet.") for name in model.state_dict())
    assert list(model.scopes()["all"]) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_loss_is_the_squared_error_on_what_is_to_be_answered(kind: str) -> None:
    model = ddpm(scheduler={**SIZES["scheduler"], "prediction_type": kind})
    x, labels, (steps, noise) = rows(model, 6)
    noisy = model.diffusion.noised(x, steps, noise)
    embedded = labels.where(labels >= 0, CLASSES)

    answer = model.unet(noisy, steps, class_labels=embedded).sample

    expected = (answer - model.diffusion.target(x, steps, noise)).flatten(1).norm(dim=1) ** 2
    losses = model.losses(x, labels, (steps, noise))
    assert (losses.shape, losses.dtype) == ((6,), torch.float32)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_who_answers_0_where_0_is_due_loses_nothing(kind: str) -> None:
    model = ClassDDPM((1, 8, 8), **{**SIZES, "scheduler": {**SIZES["scheduler"], "prediction_type": kind}})
    steps = torch.arange(TERMS)
    nothing, ones = torch.zeros(TERMS, 1, 8, 8), torch.ones(TERMS, 1, 8, 8)
    x, noise = (ones, nothing) if kind == "epsilon" else (nothing, ones)

    assert model.losses(x, torch.zeros(TERMS, dtype=torch.int64), (steps, noise)).tolist() == [0.0] * TERMS
    assert model.losses(ones, torch.zeros(TERMS, dtype=torch.int64), (steps, ones)).tolist() == [64.0] * TERMS


def test_each_loss_is_independent_of_its_batch_mates(model: ClassDDPM) -> None:
    x, labels, draws = rows(model, 9)

    alone = [model.losses(x[i : i + 1], labels[i : i + 1], some(draws, slice(i, i + 1))) for i in range(9)]

    # another number of rows may add up in another order
    torch.testing.assert_close(model.losses(x, labels, draws), torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter(model: ClassDDPM) -> None:
    one = copy.deepcopy(model)
    one.losses(*rows(one, 16)).sum().backward()

    found = {name: float(p.grad.abs().max()) if p.grad is not None else 0.0 for name, p in one.named_parameters()}

    assert [name for name, most in found.items() if not most > 0] == []


def test_classes_and_none_matter_to_the_loss(model: ClassDDPM) -> None:
    x, _, draws = rows(model, 5)

    losses = [model.losses(x, torch.full((5,), label), draws) for label in range(-1, CLASSES)]

    assert len({float(values.detach().sum()) for values in losses}) == CLASSES + 1


def test_stratified_draws_of_all_terms_have_each_timestep_once(model: ClassDDPM) -> None:
    steps, noise = model.draw_stratified(model.terms, generator=generator())

    assert steps.tolist() == list(range(TERMS))
    assert noise.shape == (TERMS, *model.image_shape)


@pytest.mark.parametrize("n_bits", [1, 3, 8])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6)])
def test_images_survive_encoding_up_to_the_colour_depth(shape: tuple[int, int, int], n_bits: int) -> None:
    model = ClassDDPM(shape, n_bits, **SIZES)
    images = torch.randint(256, (20, *shape), generator=generator()).to(torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 255])
    levels = images // 2 ** (8 - n_bits)

    x = model.encode(images, generator=generator())

    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.equal(model.images(x) // 2 ** (8 - n_bits), levels)
    assert torch.equal(model.encode(model.images(x), generator=generator()), x)
    assert torch.equal(model.images(3 * x), model.images((3 * x).clamp(-1, 1)))


def test_samples_are_given_by_the_generator_and_are_what_is_generated(model: ClassDDPM) -> None:
    labels = torch.tensor([0, 1, 2, NO_CONDITION])

    first, again, other = (model.sample(labels, generator=generator(seed)) for seed in (1, 1, 2))

    assert (first.shape, first.dtype) == ((4, 1, 8, 8), torch.uint8)
    assert torch.equal(first, model.images(model.generate(labels, generator=generator(1))))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_first_rows_of_many_are_those_of_few(model: ClassDDPM, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(9) % CLASSES
    many = model.generate(labels, generator=generator(1))

    few = model.generate(labels[:2], generator=generator(1))
    monkeypatch.setattr("models.ddpm.DRAWN_VALUES", {"cpu": 4 * 8 * 64})  # four at once
    pieces = model.generate(labels, generator=generator(1))

    torch.testing.assert_close(few, many[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pieces, many, rtol=1e-4, atol=1e-4)


def test_none_to_draw_is_none(model: ClassDDPM) -> None:
    assert model.sample(torch.zeros(0, dtype=torch.int64), generator=generator()).shape == (0, 1, 8, 8)


def test_guidance_1_is_the_condition_alone_and_more_moves_away_from_none(model: ClassDDPM) -> None:
    one = copy.deepcopy(model)
    labels, x = torch.tensor([0, 1, 2]), torch.randn(3, 1, 8, 8, generator=generator(4))

    def by_hand(scale: float) -> Tensor:
        def answer(noisy: Tensor, steps: Tensor) -> Tensor:
            told = one.unet(noisy, steps, class_labels=labels).sample
            plain = one.unet(noisy, steps, class_labels=torch.full_like(labels, CLASSES)).sample
            return plain + scale * (told - plain)

        return one.diffusion.reverse(answer, x, 5)

    found = {}
    for scale in (1.0, 2.0):
        one.sampling = Sampling(5, scale)
        start = torch.stack([torch.randn(1, 8, 8, generator=draws) for draws in [generator(7)] for _ in range(3)])
        x = start
        found[scale] = one.generate(labels, generator=generator(7))
        torch.testing.assert_close(found[scale], by_hand(scale), rtol=1e-3, atol=1e-3)
    assert float((found[1.0] - found[2.0]).abs().max()) > 1e-2


def test_without_a_condition_guidance_counts_for_nothing(model: ClassDDPM) -> None:
    one, none = copy.deepcopy(model), model.null_condition.expand(3)
    drawn = []
    for scale in (1.0, 3.0):
        one.sampling = replace(model.sampling, guidance_scale=scale)
        drawn.append(one.generate(none, generator=generator()))

    assert model.null_condition.shape == ()
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)


def test_building_and_drawing_leave_global_randomness_alone() -> None:
    before = torch.get_rng_state()

    model = ddpm()
    model.sample(torch.tensor([0]), generator=generator())
    model.losses(*rows(model, 2))

    assert torch.equal(torch.get_rng_state(), before)


def test_equal_generators_start_equal_models_and_none_starts_zeros() -> None:
    first, again = (ClassDDPM((1, 8, 8), **SIZES, generator=generator(5)).state_dict() for _ in range(2))
    empty = ClassDDPM((1, 8, 8), **SIZES)

    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert all(not bool(p.any()) for p in empty.parameters())


def test_a_fresh_one_says_that_there_is_no_noise() -> None:
    model = ClassDDPM((1, 8, 8), **SIZES, generator=generator())
    x, labels, (steps, noise) = rows(model, 4)

    torch.testing.assert_close(model.losses(x, labels, (steps, noise)), noise.square().flatten(1).sum(1))


@pytest.mark.parametrize(
    "sizes",
    [{}, {"middle_attention": False, "scale_shift": False, "attention": False}, {"channels": [8], "attention": [True]}],
)
def test_a_checkpoint_gives_back_the_same_bits(sizes: dict[str, Any], tmp_path: Path) -> None:
    model, path = ddpm(n_bits=5, **sizes), tmp_path / "ddpm.safetensors"
    model.sampling = Sampling(7, 3.0)

    save_checkpoint(path, model, {"note": "tiny"})

    loaded, manifest = load_conditional(path), read_manifest(path)
    assert isinstance(loaded, ClassDDPM)
    assert (manifest.family, manifest.n_bits, manifest.image_shape) == ("ddpm", 5, (1, 8, 8))
    assert manifest.architecture == loaded.architecture == model.architecture
    assert (loaded.sampling, loaded.terms) == (Sampling(7, 3.0), TERMS)
    assert torch.equal(loaded.losses(*rows(model, 4)), model.losses(*rows(model, 4)))
    labels = torch.arange(CLASSES)
    assert torch.equal(loaded.sample(labels, generator=generator()), model.sample(labels, generator=generator()))


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("channels", [10**6, 16], ArchitectureError),
        ("channels", [8, "wide"], ArchitectureError),
        ("channels", [], ArchitectureError),
        ("channels", [8] * 9, ArchitectureError),
        ("channels", 8, ManifestError),
        ("layers", 0, ArchitectureError),
        ("layers", 10**6, ArchitectureError),
        ("attention", [True], ArchitectureError),
        ("attention", [1, 0], ArchitectureError),
        ("norm_groups", 3, ArchitectureError),
        ("norm_groups", 0, ArchitectureError),
        ("head_width", 5, ArchitectureError),
        ("scale_shift", "yes", ManifestError),
        ("n_classes", 0, ArchitectureError),
        ("scheduler", {"beta_strat": 0.1}, ArchitectureError),
        ("scheduler", {"prediction_type": "score"}, ArchitectureError),
        ("sampling", {"steps": 0, "guidance_scale": 1.0}, ArchitectureError),
        ("sampling", {"steps": 5, "guidance_scale": "2"}, ArchitectureError),
        ("sampling", {"steps": 5, "guidance_scale": 0}, ArchitectureError),
        ("sampling", {"steps": 5, "order": 2}, ArchitectureError),
    ],
)
def test_a_manifest_that_lies_builds_nothing(field: str, value: object, error: type[Exception], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from models.checkpoints import METADATA_KEY

    path, lie = tmp_path / "ddpm.safetensors", tmp_path / "lie.safetensors"
    manifest = save_checkpoint(path, ClassDDPM((1, 8, 8), **SIZES))
    manifest.architecture[field] = value
    save_file(load_file(path), lie, metadata={METADATA_KEY: manifest.to_json()})

    with pytest.raises(error, match={"sampling": "sampling|guidance_scale"}.get(field, field)):
        load_checkpoint(lie)


def test_sides_must_halve_as_often_as_there_are_levels() -> None:
    with pytest.raises(ArchitectureError, match="cannot be halved 1 times"):
        ClassDDPM((1, 8, 7), **SIZES)


def with_label(label: int) -> Callable[[ClassDDPM], object]:
    return lambda model: model.sample(torch.tensor([0, label]), generator=generator())


def of(x: Tensor, *draws: Tensor) -> Callable[[ClassDDPM], object]:
    return lambda model: model.losses(x, torch.zeros(len(x), dtype=torch.int64), draws)


ONE, STEP = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
REFUSED: list[tuple[Callable[[ClassDDPM], object], type[ModelError], str]] = [
    (with_label(CLASSES), ConditionError, "no class 3; labels run from 0 to 2"),
    (with_label(-2), ConditionError, "no class -2"),
    (lambda m: m.sample(torch.zeros(2), generator=generator()), ConditionError, "int64"),
    (of(torch.zeros(1, 64), STEP, ONE), InputError, r"\(n, 1, 8, 8\)"),
    (of(ONE.long(), STEP, ONE), InputError, "float"),
    (of(ONE, ONE), InputError, "see `draw`"),
    (of(ONE, STEP, torch.zeros(1, 1, 8, 4)), InputError, "see `draw`"),
    (of(ONE, STEP + TERMS, ONE), InputError, f"from 0 to {TERMS - 1}"),
    (of(ONE, STEP.float(), ONE), InputError, "int64"),
    (lambda m: m.encode(torch.zeros(1, 1, 8, 8), generator=generator()), ImageError, "uint8"),
    (lambda m: m.encode(torch.zeros(1, 1, 9, 8, dtype=torch.uint8), generator=generator()), ImageError, "1, 8, 8"),
    (lambda m: setattr(copy.copy(m), "sampling", Sampling(TERMS + 1, 1.0)), ArchitectureError, "steps"),
    (lambda m: setattr(copy.copy(m), "sampling", Sampling(1, math.inf)), ArchitectureError, "guidance_scale"),
]


@pytest.mark.parametrize(("ask", "error", "message"), REFUSED)
def test_odd_input_is_refused_with_the_value(
    ask: Callable[[ClassDDPM], object], error: type[ModelError], message: str, model: ClassDDPM
) -> None:
    with pytest.raises(error, match=message):
        ask(model)


def test_a_process_without_such_a_model_never_imports_diffusers() -> None:
    told = (
        "import sys, models, models.families, models.checkpoints, models.convert, models.probe, models.train\n"
        "print([name for name in ('diffusers', 'transformers', 'models.ddpm') if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, timeout=120)

    assert done.stdout.strip() == "[]"


def test_a_model_imitates_itself_without_error_and_another_by_its_distance() -> None:
    model, other = ddpm(), ddpm()
    with torch.no_grad():
        other.get_parameter("unet.conv_out.bias").add_(0.5)  # every answer moves by as much
    x, labels = torch.zeros(4, *model.image_shape), torch.tensor([0, 1, 2, NO_CONDITION])
    draws = model.draw(4, generator=torch.Generator().manual_seed(0))

    own, apart = model.imitation(model, x, labels, draws), model.imitation(other, x, labels, draws)

    assert torch.equal(own, torch.zeros(4))
    torch.testing.assert_close(apart, torch.full((4,), 0.25 * x[0].numel()))
