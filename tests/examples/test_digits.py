"""The digits, their judge and its ONNX file: an even split that never changes, and one answer from both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from examples import digits
from examples.digits import (
    ClassifierRecipe,
    DigitClassifier,
    Digits,
    ScepticRecipe,
    accuracy,
    export_onnx,
    load_digits,
)
from examples.without_digits import without_digits
from models.errors import ImageError


@pytest.fixture(scope="module")
def loaded() -> Digits:
    return load_digits()


def test_the_split_is_even_over_the_digits(loaded: Digits) -> None:
    assert loaded.training.shape == (4000, 1, 16, 16)
    assert loaded.held_out.shape == (1000, 1, 16, 16)
    assert loaded.training.dtype == torch.uint8
    assert loaded.training_labels.bincount().tolist() == [400] * 10
    assert loaded.held_out_labels.bincount().tolist() == [100] * 10


def test_the_small_images_are_the_large_ones_averaged(loaded: Digits) -> None:
    large = load_digits(32)

    assert torch.equal(large.held_out_labels, loaded.held_out_labels)
    means = torch.nn.functional.avg_pool2d(large.held_out.float(), 2)
    assert float((means - loaded.held_out.float()).abs().max()) <= 0.5


def test_another_size_is_refused() -> None:
    with pytest.raises(ImageError, match="32, 28, 16 pixels a side, not 20"):
        load_digits(20)


def test_the_digits_as_they_are_are_the_middle_of_the_padded_ones(loaded: Digits) -> None:
    plain = load_digits(28, held_out=50)

    assert plain.training.shape == (4500, 1, 28, 28)
    assert plain.held_out_labels.bincount().tolist() == [50] * 10
    assert torch.equal(plain.held_out[:50], load_digits(32).held_out[:50, :, 2:-2, 2:-2])


@pytest.mark.parametrize("count", [0, 500])
def test_a_split_with_nothing_on_one_side_is_refused(count: int) -> None:
    with pytest.raises(ImageError, match=f"1 to 499 can be held out, not {count}"):
        load_digits(held_out=count)


def test_a_moment_of_training_tells_most_digits_apart(loaded: Digits) -> None:
    recipe = ClassifierRecipe(steps=40, batch=48)

    first, second = (digits.train_classifier(loaded, recipe) for _ in range(2))

    assert accuracy(first, loaded.held_out, loaded.held_out_labels) > 0.8
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())


def test_a_sceptic_tells_digits_apart_and_answers_evenly_to_what_is_none(loaded: Digits) -> None:
    common = {"steps": 60, "batch": 48}
    plain, sceptic = (digits.train_classifier(loaded, kind(**common)) for kind in (ClassifierRecipe, ScepticRecipe))
    empty = without_digits(loaded.held_out, torch.Generator().manual_seed(5))

    assert empty.dtype == torch.uint8
    assert empty.shape == loaded.held_out.shape
    assert accuracy(sceptic, loaded.held_out, loaded.held_out_labels) > 0.8
    certain = [float(judge.posterior(empty).amax(1).mean()) for judge in (plain, sceptic)]
    assert certain[1] < 0.2 < certain[0]


def test_the_onnx_file_answers_as_the_classifier(loaded: Digits, tmp_path: Path) -> None:
    classifier = DigitClassifier(generator=torch.Generator().manual_seed(0)).eval()
    images = loaded.held_out[:7].float() / 255

    export_onnx(classifier, tmp_path / "digits.onnx")

    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx", providers=["CPUExecutionProvider"])
    (entry,), (answer,) = session.get_inputs(), session.get_outputs()
    assert (entry.shape, answer.shape) == (["N", 1, 16, 16], ["N", 10])
    (logits,) = session.run(None, {entry.name: images.numpy()})
    with torch.no_grad():
        assert np.allclose(logits, classifier(images).numpy(), atol=1e-5)


def test_a_digit_is_exported_for_upload(loaded: Digits, tmp_path: Path) -> None:
    paths = digits.export_digit(3, tmp_path, count=4)

    assert len(paths) == 4
    wanted = loaded.held_out[loaded.held_out_labels == 3][0, 0]
    with Image.open(paths[0]) as image:
        assert torch.equal(torch.from_numpy(np.array(image)), wanted)


def test_a_recipe_of_its_own_has_a_file_of_its_own(tmp_path: Path) -> None:
    shorter = digits.TrainingRecipe(steps=1)

    assert digits.base_path(tmp_path, shorter) != digits.base_path(tmp_path)
    assert digits.base_path(tmp_path) == digits.base_path(tmp_path)
