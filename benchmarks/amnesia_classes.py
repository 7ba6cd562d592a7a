"""A class-conditional diffusion model forgets a digit, for uniform noise and for another digit, by the runner.

Beside the row of Heng and Soh (NeurIPS 2023, Table 1: the DDPM on CIFAR-10, lambda 10), whose base is far larger.
Base: the DDPM of 8 x 8 digits of `examples.digit_ddpm`. As for the VAE, two judges: a plain one that has seen digits
alone, and a sceptic that has seen noise too and answers evenly to it (docs/decisions/0015), which is the one that ends
the request for noise. What the rest is worth is its distance (KID) from real digits, base and changed from equal noise,
in features of the plain judge; the ratio of the two is 1 where nothing was lost.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.amnesia_jobs import Jobs, Ran
from benchmarks.amnesia_prompts import judge_spec
from evidence.kid import Extractor, Kid, kid_beside_floor
from examples.digit_ddpm import JUDGE_RECIPE, digit_ddpm, judge, load
from examples.digits import DigitClassifier, ScepticRecipe, accuracy, export_onnx
from models.checkpoints import load_conditional, save_checkpoint
from models.ddpm import ClassDDPM
from unlearning.randomness import stream

PAPER = {"p_before": 0.979, "entropy_before": 0.029, "p": 0.156, "entropy": 1.47}
"""Table 1, CIFAR-10."""
SCEPTIC = ScepticRecipe(shift=JUDGE_RECIPE.shift)
DIGIT, REPLACEMENT = 0, 1
SAMPLES, SAMPLES_OF_OTHERS = 500, 250
"""Of the forgotten class, and of each other."""
RECOGNISED = 0.5
REPLAY = 1000
CRITERIA = {"forgotten_at_most": 0.05, "others_within": 0.02}

Log = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Judged:
    """What judges make of a model's samples."""

    p: float
    """Mean P(y = c_f) of samples of the forgotten class, by the plain judge."""
    p_sceptic: float
    entropy: float
    """Mean entropy of the sceptic's answer, in nats."""
    recognised: float
    """Share in which the sceptic recognises any class."""
    p_replacement: float
    """As `p`, of the class that may take its place."""
    others: float
    """Share of the samples of all other classes that the plain judge takes for what they are."""
    kid: Kid
    """Of these samples, from as many real digits."""
    kid_pixels: float
    """Likewise, of the pixels themselves."""


@dataclass(frozen=True)
class Request:
    """One request, and what it made of the model."""

    name: str
    ran: Ran
    after: Judged


class Bench:
    """A base, its judges, and real digits to compare with."""

    def __init__(self, model: ClassDDPM, plain: DigitClassifier, sceptic: DigitClassifier, digit: int = DIGIT) -> None:
        self.model, self.plain, self.sceptic, self.digit = model, plain, sceptic, digit
        self.others = [label for label in range(model.n_classes) if label != digit]
        digits = load()
        self._real = digits.training[torch.isin(digits.training_labels, torch.tensor(self.others))]
        self._features = Extractor("last hidden layer of the plain judge", plain.embed)
        self._pixels = Extractor("pixels", lambda images: images.flatten(1).double() / 255)

    def judged(self, model: ClassDDPM, *, own: int = SAMPLES, each: int = SAMPLES_OF_OTHERS, seed: int = 0) -> Judged:
        """Of fresh samples, from noise that no step draws."""
        forgotten = torch.full((own,), self.digit)
        images = model.sample(forgotten, generator=stream(seed, "amnesia judge", "forgotten"))
        answers, doubts = self.plain.posterior(images).double(), self.sceptic.posterior(images).double()
        labels = torch.tensor(self.others).repeat_interleave(each)
        kept = model.sample(labels, generator=stream(seed, "amnesia judge", "others"))
        return Judged(
            p=float(answers[:, self.digit].mean()),
            p_sceptic=float(doubts[:, self.digit].mean()),
            entropy=float(torch.special.entr(doubts).sum(1).mean()),
            recognised=float((doubts.amax(1) >= RECOGNISED).double().mean()),
            p_replacement=float(answers[:, REPLACEMENT].mean()),
            others=float((self.plain.classify(kept) == labels).double().mean()),
            kid=self._distance(kept, self._features),
            kid_pixels=self._distance(kept, self._pixels).value,
        )

    def _distance(self, kept: Tensor, extractor: Extractor) -> Kid:
        """From real digits; the same of these and, for equal numbers, the same noise, whatever the model."""
        return kid_beside_floor(self._real, kept, extractor, seed=0)


def request(replace_with: Mapping[str, object], criteria: Mapping[str, float], seed: int = 0) -> dict[str, Any]:
    """The members of the job that say what is asked."""
    return {
        "seed": seed, "target": {"class_label": DIGIT}, "replace_with": dict(replace_with), "judge": judge_spec(),
        "remember": {"generated": REPLAY}, "criteria": dict(criteria), "parameters": {},
    }  # fmt: skip


def summary(before: Judged, requests: Sequence[Request]) -> dict[str, Any]:
    """The figures of the last line; the first request is the paper's, for noise."""
    rows = [
        {
            "name": one.name, "met": one.ran.met, "steps": one.ran.steps, "seconds": one.ran.training,
            "until_training": one.ran.until_training, "phases": one.ran.seconds, **asdict(one.after),
            "others_drop": before.others - one.after.others, "kid_ratio": one.after.kid.value / before.kid.value,
            "kid_pixels_ratio": one.after.kid_pixels / before.kid_pixels,
        }
        for one in requests
    ]  # fmt: skip
    return {
        "ddpm_p_before": before.p, "ddpm_p": rows[0]["p"], "ddpm_p_sceptic": rows[0]["p_sceptic"],
        "ddpm_entropy": rows[0]["entropy"], "ddpm_p_worst": max(row["p"] for row in rows),
        "ddpm_kid_ratio": rows[0]["kid_ratio"], "ddpm_kid_ratio_worst": max(row["kid_ratio"] for row in rows),
        "ddpm_others_drop": rows[0]["others_drop"], "ddpm_seconds": rows[0]["seconds"], "ddpm_before": asdict(before),
        "ddpm_runs": rows, "ddpm_paper": PAPER,
    }  # fmt: skip


def measure(log: Log, *, quick: bool, threads: int) -> dict[str, Any]:
    """The base, and a request each for noise and for another digit.

    Args:
        log: told of each row as it is there.
        quick: for noise alone.
        threads: of the runner.
    """
    plain, sceptic, digits = judge(), judge(recipe=SCEPTIC), load()
    bench = Bench(digit_ddpm(), plain, sceptic)
    before = bench.judged(bench.model)
    show("base", before)
    with tempfile.TemporaryDirectory(prefix="amnesia-") as work:
        asked = {
            "for noise": (sceptic, request({"noise": True}, CRITERIA)),
            "for another digit": (plain, request({"class_label": REPLACEMENT}, {**CRITERIA, "replaced_at_least": 0.9})),
        }
        requests = [
            _requested(bench, name, classifier, job, Path(work), threads)
            for name, (classifier, job) in list(asked.items())[: 1 if quick else None]
        ]
    found = summary(before, requests)
    for row in found["ddpm_runs"]:
        log(row)
    right = {
        name: accuracy(one, digits.held_out, digits.held_out_labels)
        for name, one in (("plain", plain), ("sceptic", sceptic))
    }
    return {
        **found,
        "ddpm_judges": right,
        "ddpm_samples": [SAMPLES, SAMPLES_OF_OTHERS],
        "ddpm_load": list(os.getloadavg()),
    }


def _requested(
    bench: Bench, name: str, classifier: DigitClassifier, job: Mapping[str, Any], folder: Path, threads: int
) -> Request:
    save_checkpoint(folder / "base.safetensors", bench.model)
    export_onnx(classifier, folder / "judge.onnx")
    jobs = Jobs(folder / "base.safetensors", folder / "judge.onnx", folder, threads)
    ran = jobs.run(name.replace(" ", "-"), job)
    changed = cast(ClassDDPM, load_conditional(ran.checkpoint, torch.device("cpu")))
    changed.sampling = bench.model.sampling
    found = Request(name, ran, bench.judged(changed))
    show(name, found.after, ran)
    return found


def show(name: str, found: Judged, ran: Ran | None = None) -> None:
    """One row, in a line."""
    run = f"{'yes' if ran.met else ' no'}  {ran.steps:5d}  {ran.training:7.1f}" if ran else " " * 19
    floor = "" if found.kid.floor is None else f" (floor {found.kid.floor:.4f})"
    print(
        f"{name:>22}  {run}  {found.p:6.3f}  {found.p_sceptic:9.3f}  {found.entropy:7.3f}  {found.recognised:10.3f}"
        f"  {found.p_replacement:8.3f}  {found.others:6.4f}  {found.kid.value:.4f}{floor}  {found.kid_pixels:.5f}",
        flush=True,
    )
