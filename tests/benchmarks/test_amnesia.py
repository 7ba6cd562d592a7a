"""The benchmark of Selective Amnesia: what its last line says, and that its bench judges what it says it does."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.amnesia_vae import Bench, Figures, Run, summary
from examples.digits import DigitClassifier
from models.vae import ConditionalVAE
from unlearning import AmnesiaParameters

BEFORE = Figures(p=0.97, entropy=0.1, recognised=0.99, others=0.95)


def untrained() -> ConditionalVAE:
    return ConditionalVAE((1, 28, 28), n_classes=10, hidden=(8,), latent=2, generator=torch.Generator().manual_seed(0))


def ended(name: str, others: float) -> Run:
    return Run(name, True, 250, 16.0, 1e-3, Figures(0.1, 2.29, 0.01, others), untrained())


def test_the_last_line_is_of_the_first_run_and_the_others_are_beside_it() -> None:
    figures = summary(BEFORE, [ended("whole", 0.94), ended("bare", 0.5)], [{"p": 0.2}], digit=0)

    assert (figures["vae_p_before"], figures["vae_p"], figures["vae_entropy"]) == (0.97, 0.1, 2.29)
    assert figures["vae_others_drop"] == pytest.approx(0.01)
    assert (figures["vae_seconds"], figures["vae_met"]) == (16.0, True)
    assert figures["vae_ablation"][0]["others_drop"] == pytest.approx(0.45)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_a_request_ends_where_nothing_is_recognised() -> None:
    judge = DigitClassifier(28, torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        judge.linear2.weight.zero_()
        judge.linear2.bias.zero_()  # an even answer, whatever it is shown
    bench = Bench(untrained(), judge, digit=3, samples=20, replay=64)

    run = bench.forget("at once", AmnesiaParameters(max_steps=20, check_every=2, batch=8, replay_batch=8))

    assert (run.met, run.steps) == (True, 2)
    assert run.after.p == pytest.approx(0.1)
    assert run.after.entropy == pytest.approx(2.302585, abs=1e-5)
    assert (run.after.recognised, len(bench.others)) == (0.0, 9)
