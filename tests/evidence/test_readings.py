"""What judges say of pictures: labels that follow from probabilities, and probabilities that mean what they say."""

import pytest
import torch

from evidence.classifier import train_classifier
from evidence.onnx_classifier import OnnxClassifier
from evidence.readings import NOTHING, Probabilistic, Reading, read
from tests.evidence.test_classifier import MIXED, SHAPE, brightness_model, grey, path, spec

__all__ = ["path"]  # a fixture


def levels(n, centre, seed):
    """Pictures around a brightness, which a neighbouring one overlaps."""
    level = centre + 20 * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    return (level + grey(n, 0, seed).float()).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def judge():
    """Of two classes that cannot be told for certain."""
    return train_classifier({"darker": levels(300, 110, 1), "lighter": levels(300, 140, 2)}, seed=2)


def test_labels_of_a_trained_judge_are_its_likeliest_classes(judge):
    images = torch.cat([levels(50, 110, 3), levels(50, 140, 4)])

    found = read(judge, images)

    assert isinstance(judge, Probabilistic)
    assert torch.equal(found.labels, judge(images))
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(100, dtype=torch.float64))


def test_a_trained_judge_is_as_often_right_as_it_is_sure(judge):
    images = torch.cat([levels(2000, 110, 5), levels(2000, 140, 6)])
    labels = torch.arange(2).repeat_interleave(2000)

    found = read(judge, images)

    sure = found.probabilities.max(1).values
    right = (found.labels == labels).double()
    for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
        rows = (sure >= low) & (sure < high)
        assert rows.sum() > 100
        # A line through scores is no logistic curve, and was fitted to some hundreds: near, not exact.
        assert abs(float(right[rows].mean() - sure[rows].mean())) < 0.08


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.9])
def test_two_classes_of_a_file_are_told_by_its_threshold(path, threshold):
    classifier = OnnxClassifier(brightness_model(path), spec(output="logits", threshold=threshold), SHAPE)

    found = read(classifier, MIXED)

    assert torch.equal(found.labels, classifier(MIXED))
    assert found.probabilities.shape == (5, 2)
    # sigmoid(60 / 255) = .56 and sigmoid(200 / 255) = .69
    assert found.probabilities[:, 1].tolist() == pytest.approx([0.56] * 3 + [0.69] * 2, abs=0.02)


@pytest.mark.parametrize(("output", "softmax"), [("logits", False), ("probabilities", True)])
def test_probabilities_of_a_file_are_its_own_or_a_softmax(path, output, softmax):
    names = tuple("abc") if not softmax else ("dark", "light")
    classifier = OnnxClassifier(
        brightness_model(path, k=len(names), softmax=softmax), spec(classes=names, output=output), SHAPE
    )

    found = read(classifier, MIXED)

    assert torch.equal(found.labels, classifier(MIXED))
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(5, dtype=torch.float64))


def test_a_score_tells_labels_alone(path):
    classifier = OnnxClassifier(brightness_model(path, k=1), spec(), SHAPE)

    found = read(classifier, MIXED)

    assert found.probabilities is None
    assert found.labels.tolist() == [0, 0, 0, 1, 1]


class _Labels:
    """A classifier that knows nothing of probabilities."""

    name, classes = "labels", ("a", "b")

    def __call__(self, images):
        return torch.zeros(len(images), dtype=torch.int64)


def test_a_classifier_that_tells_labels_alone_is_read_too():
    assert read(_Labels(), MIXED).probabilities is None


def test_a_picture_shows_what_is_likelier_than_all_else_together():
    answers = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.1, 0.8]], dtype=torch.float64)

    assert Reading(answers.argmax(1), answers).seen.tolist() == [0, NOTHING, 2]


def test_of_two_classes_one_is_always_shown_and_labels_alone_are_believed():
    answers = torch.tensor([[0.4, 0.6]], dtype=torch.float64)

    assert Reading(torch.tensor([0]), answers).seen.tolist() == [0]  # as its threshold says
    assert Reading(torch.tensor([2, 1]), None).seen.tolist() == [2, 1]
