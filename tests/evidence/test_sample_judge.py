"""The judge that learns from a model's own samples: it sees what is faint, and is undecided where nothing is."""

import math

import pytest
import torch

from evidence.errors import InsufficientEvidenceError
from evidence.readings import read
from evidence.sample_judge import faded, train_on_samples
from tests.evidence.test_classifier import grey, stripes

NAMES = ("flat", "upright")


def drawn(n, seed):
    """n stripes of both directions, and which they are of."""
    labels = torch.arange(2).repeat_interleave(n)
    return torch.cat([stripes(n, False, seed), stripes(n, True, seed + 1)]), labels


@pytest.fixture(scope="module")
def judge():
    return train_on_samples(*drawn(150, 1), drawn(200, 11), NAMES, seed=3, name="own")


def test_it_tells_clear_and_faint_ones(judge):
    images, labels = drawn(200, 21)
    faint = faded(images, torch.Generator().manual_seed(5), faintest=0.3, clearest=0.4)

    assert (judge(images) == labels).double().mean() > 0.95
    assert (judge(faint) == labels).double().mean() > 0.85


def uniform(n):
    """Noise over the whole range of a pixel: what a diffusion model has learnt to draw."""
    shape = (n, *drawn(1, 21)[0].shape[1:])
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(6)).to(torch.uint8)


def grey_grain(n):
    return faded(drawn(n, 21)[0], torch.Generator().manual_seed(5), faintest=0.0, clearest=0.0)


def black_and_white(n):
    return (uniform(n) > 127).to(torch.uint8) * 255


@pytest.mark.parametrize("noise", [grey_grain, uniform, black_and_white])
def test_it_is_undecided_where_nothing_is_left(judge, noise):
    nothing = noise(200)

    blank, clear = (read(judge, some).probabilities for some in (nothing, drawn(200, 31)[0]))
    entropy = [float(-torch.xlogy(one, one).sum(1).mean()) for one in (blank, clear)]

    assert entropy[0] > 0.6 * math.log(2)
    assert entropy[1] < 0.5 * entropy[0]


def test_its_accuracy_is_that_on_samples_it_did_not_learn_from(judge):
    images, labels = drawn(200, 11)

    assert judge.accuracy.n == 400
    assert judge.accuracy.value == float((judge(images) == labels).double().mean())


def test_classes_that_look_alike_are_refused():
    images, fresh = (torch.cat([grey(100, 90, seed), grey(100, 90, seed + 1)]) for seed in (1, 11))
    labels = torch.arange(2).repeat_interleave(100)

    with pytest.raises(InsufficientEvidenceError, match="chance"):
        train_on_samples(images, labels, (fresh, labels), NAMES, seed=3, name="own")


def test_fading_keeps_within_the_contrast_that_is_asked_for():
    black, white = torch.zeros(500, 1, 6, 6, dtype=torch.uint8), torch.full((500, 1, 6, 6), 255, dtype=torch.uint8)

    gap = [
        (
            faded(white, torch.Generator().manual_seed(1), faintest=low, clearest=high).float()
            - faded(black, torch.Generator().manual_seed(1), faintest=low, clearest=high).float()
        ).mean((1, 2, 3))
        / 255
        for low, high in ((0.0, 0.0), (0.25, 0.5), (1.0, 1.0))
    ]

    assert gap[0].abs().max() == 0
    assert 0.22 < gap[1].min() < gap[1].max() < 0.51  # noise beyond black and white is cut off
    assert gap[2].min() == 1
