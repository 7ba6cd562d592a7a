"""Selective Amnesia on a diffusion model: what replay is held against, and what it makes without a condition."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from models.ddpm import ClassDDPM
from unlearning import (
    AmnesiaParameters,
    AmnesiaResult,
    Check,
    DivergedError,
    Examples,
    Noise,
    fisher_information,
    forget_conditions,
)

SHAPE = (1, 8, 8)
SHORT = AmnesiaParameters(max_steps=2, batch=8, replay_batch=8, check_every=100)


@pytest.fixture(scope="module")
def base() -> ClassDDPM:
    """A DDPM that has learnt nothing."""
    generator = torch.Generator().manual_seed(0)
    return ClassDDPM(
        SHAPE, channels=[8, 16], layers=1, attention=[False, False], n_classes=3, norm_groups=4, generator=generator
    ).eval()


def forgot(base: ClassDDPM, values: AmnesiaParameters) -> AmnesiaResult:
    generator = torch.Generator().manual_seed(1)
    replay = Examples(torch.randn(40, *SHAPE, generator=generator).clamp(-1, 1), torch.arange(40) % 2 + 1)
    names = [name for name, _ in base.named_parameters()]
    fisher = fisher_information(base, replay.x[:4], replay.condition[:4], names=names, seed=0, draws_per_example=2)
    return forget_conditions(
        base, torch.tensor([0]), Noise(SHAPE, -1.0, 1.0), replay, fisher, values,
        criterion=lambda model, seed: Check(False), seed=3,
    )  # fmt: skip


def test_a_teacher_has_nothing_to_correct_before_the_first_step(base: ClassDDPM) -> None:
    taught, told = (forgot(base, replace(SHORT, replay_target=one)).history for one in ("teacher", "truth"))

    assert taught[0]["replay"] == 0.0 < taught[1]["replay"]
    assert told[0]["replay"] > 1.0
    assert taught[0]["surrogate"] == told[0]["surrogate"]


def test_the_default_has_a_teacher_and_the_paper_the_truth(base: ClassDDPM) -> None:
    default, paper = (forgot(base, replace(SHORT, mode=mode)).history[0]["replay"] for mode in ("default", "paper"))

    assert default == 0.0 < paper


def test_what_it_makes_without_a_condition_is_replayed_as_often_as_asked(base: ClassDDPM) -> None:
    odd = copy.deepcopy(base)
    with torch.no_grad():
        odd.get_parameter("unet.class_embedding.weight")[-1] = 1e30  # whoever asks without a condition gets no number
    truth = replace(SHORT, replay_target="truth")

    assert forgot(odd, replace(truth, null_share=0.0)).rollbacks == 0
    with pytest.raises(DivergedError):
        forgot(odd, replace(truth, null_share=0.5, max_steps=20))
