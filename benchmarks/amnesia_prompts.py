"""Stable Diffusion forgets a word: three digits, three seeds, by the runner, on phrasings that training never saw.

The base is the pipeline of captioned digits (`examples.captioned_digits`), which has two names for each digit; a
request forgets both. What stays is asked for by both as well, though only the first is remembered. The judge has seen
real digits alone. The first job on the checkpoint draws its samples and computes F; all others find them.
"""

import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.amnesia_jobs import Jobs, Ran
from examples.captioned_digits import ALIASES, WORDS, judge, load
from examples.digits import CLASSES, DigitClassifier, export_onnx
from models.checkpoints import load_conditional, save_checkpoint
from models.conditional import PromptConditional
from models.stable_diffusion import StableDiffusion
from unlearning import prompts
from unlearning.randomness import stream

PAIRS = ((0, 1), (3, 8), (7, 2))
"""What is forgotten, and what takes its place."""
SEEDS = (0, 1, 2)
FORGOTTEN_AT_MOST, REPLACED_AT_LEAST, OTHERS_WITHIN = 0.05, 0.9, 0.02
REPLAY = 1000
SAMPLES, SAMPLES_OF_OTHERS = 100, 40
"""Of the forgotten word, and of each other: half of them by each name."""
CONTROL_STEPS = 150
"""Of the rows that leave terms out: they do not stop by themselves."""
WITHOUT: Mapping[str, tuple[str, ...]] = {
    "whole objective": (), "without penalty": ("penalty",), "without replay": ("replay",),
    "neither (fine-tuning)": ("penalty", "replay"),
}  # fmt: skip

Log = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Drawn:
    """What the judge makes of a model's drawings of every digit."""

    p: list[float]
    """Mean P(y = c) of drawings of c, by digit."""
    accuracy: list[float]
    by_name: list[float]
    """Accuracy of those that were asked for by the word alone."""
    shown: list[float]
    """Mean answer to drawings of the digit that was looked at closely."""


@dataclass(frozen=True)
class Forgot:
    """One request, and what it made of the model."""

    name: str
    digit: int
    replacement: int
    seed: int
    p_forgotten: float
    p_replacement: float
    others_drop: float
    """Accuracy over all other digits, before less after."""
    others_drop_by_name: float
    """Likewise, asked for by the word alone."""
    others_drop_p: float
    """Likewise, of mean P(y = c)."""
    worst_digit_drop: float
    met: bool
    steps: int
    seconds: float
    """Of steps and looks."""
    until_training: float
    """Seconds from the start of the process to the first step."""
    made: int
    """Assets that were not there yet."""
    phases: Mapping[str, float] = field(default_factory=dict)


class Studio:
    """A base, its judge, and a runner for its requests."""

    def __init__(self, model: StableDiffusion, classifier: DigitClassifier, folder: Path, threads: int) -> None:
        self.model, self.classifier = model, classifier
        save_checkpoint(folder / "base.safetensors", model)
        export_onnx(classifier, folder / "judge.onnx")
        self.jobs = Jobs(folder / "base.safetensors", folder / "judge.onnx", folder, threads)
        self._before: dict[int, Drawn] = {}

    def before(self, digit: int) -> Drawn:
        """What the base draws, that digit closely."""
        if digit not in self._before:
            self._before[digit] = drawn_by(self.model, self.classifier, digit)
        return self._before[digit]

    def forget(self, name: str, digit: int, replacement: int, seed: int, **parameters: Any) -> Forgot:
        """One request, judged."""
        ran = self.jobs.run(f"{digit}-{seed}", request(digit, replacement, seed, self.model, parameters))
        changed = cast(StableDiffusion, load_conditional(ran.checkpoint, torch.device("cpu")))
        changed.sampling = self.model.sampling
        after = drawn_by(changed, self.classifier, digit)
        return forgot(name, digit, replacement, seed, ran, self.before(digit), after)


def request(
    digit: int, replacement: int, seed: int, model: StableDiffusion, parameters: Mapping[str, object]
) -> dict[str, Any]:
    """The members of the job that say what is asked."""
    others = [word for number, word in enumerate(WORDS) if number != digit]
    sampling = {"guidance_scale": model.sampling.guidance_scale, "sampling_steps": model.sampling.steps}
    shows = {word: CLASSES[number] for number, word in enumerate(WORDS)}
    return {
        "seed": seed,
        "target": {"concept": WORDS[digit], "aliases": [ALIASES[digit]]},
        "replace_with": {"concept": WORDS[replacement]},
        "remember": {"generated": REPLAY, "concepts": others},
        "judge": judge_spec(shows),
        "criteria": {
            "forgotten_at_most": FORGOTTEN_AT_MOST, "replaced_at_least": REPLACED_AT_LEAST,
            "others_within": OTHERS_WITHIN,
        },
        "parameters": {**sampling, **parameters},
    }  # fmt: skip


def judge_spec(shows: Mapping[str, str] | None = None) -> dict[str, Any]:
    """How a job names a classifier of the ten digits."""
    spec = {"classes": list(CLASSES), "output": "logits", "threshold": 0.5, "scale": "unit", "name": "digits"}
    return {**spec, "shows": dict(shows)} if shows else spec


def drawn_by(model: PromptConditional, classifier: DigitClassifier, closely: int, seed: int = 0) -> Drawn:
    """Drawings of every digit, more of one, in held-out phrasings by both names in turn."""
    p, accuracy, by_name = [], [], []
    shown: list[float] = []
    for digit in range(len(WORDS)):
        n = SAMPLES if digit == closely else SAMPLES_OF_OTHERS
        answers = answers_to(model, classifier, digit, n, seed)
        right = (answers.argmax(1) == digit).double()
        p.append(float(answers[:, digit].mean()))
        accuracy.append(float(right.mean()))
        by_name.append(float(right[::2].mean()))
        shown = answers.mean(0).tolist() if digit == closely else shown
    return Drawn(p, accuracy, by_name, shown)


@torch.no_grad()
def answers_to(model: PromptConditional, classifier: DigitClassifier, digit: int, n: int, seed: int) -> Tensor:
    """The judge's posteriors (n, 10) float64 of n drawings of a digit: by its word, by its other name, and so on."""
    asked = [template.format(name) for template in prompts.HELD_OUT for name in (WORDS[digit], ALIASES[digit])]
    rows = model.tokens([asked[number % len(asked)] for number in range(n)])
    return classifier.posterior(model.sample(rows, generator=stream(seed, "amnesia judge", digit))).double()


def forgot(name: str, digit: int, replacement: int, seed: int, ran: Ran, before: Drawn, after: Drawn) -> Forgot:
    """A run with its figures."""
    others = [one for one in range(len(WORDS)) if one != digit]

    def drops(of: Callable[[Drawn], Sequence[float]]) -> list[float]:
        return [of(before)[one] - of(after)[one] for one in others]

    return Forgot(
        name=name,
        digit=digit,
        replacement=replacement,
        seed=seed,
        p_forgotten=after.shown[digit],
        p_replacement=after.shown[replacement],
        others_drop=statistics.fmean(drops(lambda drawn: drawn.accuracy)),
        others_drop_by_name=statistics.fmean(drops(lambda drawn: drawn.by_name)),
        others_drop_p=statistics.fmean(drops(lambda drawn: drawn.p)),
        worst_digit_drop=max(drops(lambda drawn: drawn.accuracy)),
        met=ran.met,
        steps=ran.steps,
        seconds=ran.training,
        until_training=ran.until_training,
        made=ran.made,
        phases=ran.seconds,
    )


def summary(runs: Sequence[Forgot], controls: Sequence[Forgot], before: Mapping[str, float]) -> dict[str, Any]:
    """The figures of the last line: the worst of all requests, of whatever digit and seed."""
    first, later = runs[0], runs[1:]
    found = [run for run in later if not run.made]
    return {
        "sd_p_before": before,
        "sd_p_forgotten_worst": max(run.p_forgotten for run in runs),
        "sd_p_replacement_worst": min(run.p_replacement for run in runs),
        "sd_others_drop_worst": max(run.others_drop for run in runs),
        "sd_seconds": max(run.seconds for run in runs),
        "sd_met": all(run.met for run in runs),
        "sd_first_request": dict(first.phases),
        "second_request_seconds": max((run.until_training for run in later), default=None),
        "second_request_seconds_median": statistics.median(run.until_training for run in later) if later else None,
        "second_requests_that_found_all": len(found),
        "sd_runs": [asdict(run) for run in runs],
        "sd_ablation": [asdict(run) for run in controls],
        "sd_finetune_others": next((run.others_drop for run in controls if "replay" in WITHOUT[run.name]
                                    and "penalty" in WITHOUT[run.name]), None),
        "sd_samples": [SAMPLES, SAMPLES_OF_OTHERS],
    }  # fmt: skip


def measure(log: Log, *, quick: bool, threads: int, controls: bool = True) -> dict[str, Any]:
    """All requests, and the rows that leave terms out.

    Args:
        log: told of each row as it is there.
        quick: one digit, one seed, no control.
        threads: of the runner.
        controls: whether the rows that leave terms out are run.
    """
    model, classifier = load(), judge()
    pairs, seeds = (PAIRS[:1], SEEDS[:1]) if quick else (PAIRS, SEEDS)
    with tempfile.TemporaryDirectory(prefix="amnesia-") as work:
        studio = Studio(model, classifier, Path(work), threads)
        runs = []
        # a second request names another digit than the first: what is found then was not drawn for it
        for seed in seeds:
            for digit, replacement in pairs:
                runs.append(studio.forget("request", digit, replacement, seed))
                show(runs[-1])
                log(asdict(runs[-1]))
        without = []
        for name, terms in WITHOUT.items() if controls and not quick else ():
            same: dict[str, Any] = {"max_steps": CONTROL_STEPS, "check_every": CONTROL_STEPS, "without": list(terms)}
            without.append(studio.forget(name, *PAIRS[0], 0, **same))
            show(without[-1])
            log(asdict(without[-1]))
        base = studio.before(PAIRS[0][0])
    others = {"p_worst": min(base.p), "accuracy": statistics.fmean(base.accuracy)}
    return {**summary(runs, without, others), "sd_load": list(os.getloadavg())}


def show(run: Forgot) -> None:
    """One run, in a line."""
    met = "yes" if run.met else " no"
    asked = f"{WORDS[run.digit]:>5} -> {WORDS[run.replacement]:5} {run.seed}"
    took = f"{run.steps:5d}  {run.seconds:7.1f}  {run.until_training:7.1f}  {run.made:4d}"
    drops = f"{run.others_drop:+7.4f}  {run.others_drop_by_name:+7.4f}  {run.worst_digit_drop:+6.3f}"
    print(
        f"{run.name:>22}  {asked}  {met}  {took}  {run.p_forgotten:6.3f}  {run.p_replacement:6.3f}  {drops}", flush=True
    )
