"""Does steering reach a stated distribution over classes, and leave what lies within each class as it was?

    python -m benchmarks.debias [--quick] [--targets parity ...] [--samples 6000]

Five full distributions on the Glow that draws digits (`examples.digits`), each fraction within 3 points: even and odd
digits 50 : 50 and 30 : 70, all ten digits equally often, a ramp from 5 to 15 %, and the most frequent digit halved in
favour of the others. No training image is used, only samples of the base; the judge is the digit classifier (no
gradient goes through it).

A target counts as inside where the intervals of all its fractions (Clopper and Pearson, together 95 %) lie within its
bounds on samples that the run has not seen. A second classifier, trained from another seed, judges them as well (shown,
not counted).

Unaffected: the kernel distance (KID, the classifier's features) of the steered samples of a digit to the base's, beside
its noise floor (`evidence.kid`, one false alarm in twenty targets). Counted are the digits whose share the target
leaves within a fifth of what it was; the distances of the others are shown. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from evidence.kid import Extractor, Kid, kid_beside_floor
from examples.digits import CLASSES, N_BITS, ClassifierRecipe, DigitClassifier, digit_base, digit_classifier
from models.checkpoints import load_checkpoint, save_checkpoint
from models.glow import Glow
from models.protocol import Flow
from unlearning import Constraint, Fractions, SteeringParameters, generate_remember, steer
from unlearning.constraints import count

TOLERANCE = 0.03
SECOND_SEED = 1
JUDGE_SEED = 2**31
"""Apart from every seed that a run draws from."""
PARITY = ("even", "odd")
UNAFFECTED = 0.2
"""By what part of itself the share of a digit may be asked to change, and the digit is still taken for unaffected."""


@dataclass(frozen=True)
class Target:
    """One distribution to reach."""

    name: str
    constraint: Constraint
    wanted: dict[str, float]
    """The fraction of every class."""
    shares: list[float]
    """The fraction of every digit, were the digits of a class weighted alike."""

    def miss(self, found: Fractions) -> float:
        """How far the worst fraction lies from what was wanted."""
        return max(abs(value - self.wanted[name]) for name, value in found.values.items())


@dataclass(frozen=True)
class Outcome:
    """What the judge says of one steered flow."""

    inside: bool
    met: bool
    miss: float
    second_miss: float
    steps: int
    seconds: float
    confident: float
    distances: dict[str, Kid]
    """By digit."""
    unaffected: list[str]
    """The digits whose share the target leaves about as it was."""


def targets(classifier: DigitClassifier, base: list[float]) -> dict[str, Target]:
    """The five, given the fractions of the digits among the base's samples."""

    def parity(images: Tensor) -> Tensor:
        return classifier.classify(images) % 2

    def of_parity(name: str, even: float) -> Target:
        wanted = dict(zip(PARITY, (even, 1 - even), strict=True))
        masses = (sum(base[::2]), sum(base[1::2]))
        shares = [base[k] / masses[k % 2] * wanted[PARITY[k % 2]] for k in range(10)]
        return Target(name, Constraint.towards(PARITY, parity, wanted, TOLERANCE, name), wanted, shares)

    def of_digits(name: str, shares: list[float]) -> Target:
        wanted = {digit: share / sum(shares) for digit, share in zip(CLASSES, shares, strict=True)}
        constraint = Constraint.towards(CLASSES, classifier.classify, wanted, TOLERANCE, name)
        return Target(name, constraint, wanted, list(wanted.values()))

    most = max(range(10), key=lambda k: base[k])
    rest = (1 - base[most] / 2) / (1 - base[most])
    found = [
        of_parity("parity", 0.5),
        of_parity("odd", 0.3),
        of_digits("uniform", [0.1] * 10),
        of_digits("ramp", [0.05 + 0.1 * k / 9 for k in range(10)]),
        of_digits("halved", [base[k] / 2 if k == most else base[k] * rest for k in range(10)]),
    ]
    return {target.name: target for target in found}


class Judge:
    """Fresh samples of the base, and what is said of a steered flow beside them."""

    def __init__(self, base: Glow, classifier: DigitClassifier, second: DigitClassifier, samples: int) -> None:
        self._classifier, self._second, self._samples = classifier, second, samples
        self._extractor = Extractor("features of the digit classifier", classifier.embed)
        self._images = generate_remember(cast(Flow, base), samples, N_BITS, JUDGE_SEED)
        self._digits = classifier.classify(self._images)
        self.fractions = (self._digits.bincount(minlength=10) / samples).tolist()
        self.confident = self._confident(self._images)

    def __call__(self, steered: Flow, target: Target, met: bool, steps: int, seconds: float) -> Outcome:
        """Judge one flow."""
        images = generate_remember(steered, self._samples, N_BITS, JUDGE_SEED + 1)
        found = count(target.constraint, target.constraint.labels(images), 0.95)
        digits, again = self._classifier.classify(images), self._second.classify(images)
        labels = again % 2 if target.constraint.classes == PARITY else again
        return Outcome(
            inside=found.inside(target.constraint), met=met, miss=target.miss(found),
            second_miss=target.miss(count(target.constraint, labels, 0.95)), steps=steps, seconds=seconds,
            confident=self._confident(images),
            distances={
                name: kid_beside_floor(
                    self._images[self._digits == k], images[digits == k], self._extractor, seed=k, comparisons=10
                )
                for k, name in enumerate(CLASSES)
            },
            unaffected=[
                name for k, name in enumerate(CLASSES)
                if abs(target.shares[k] - self.fractions[k]) <= UNAFFECTED * self.fractions[k]
            ],
        )  # fmt: skip

    def _confident(self, images: Tensor) -> float:
        return float((self._classifier.posterior(images).amax(1) > 0.9).float().mean())


def show(target: Target, outcome: Outcome, curve: list[tuple[int, float, int]]) -> None:
    """One line of the table, the distances, and the curve of the class that is asked to move most."""
    print(
        f"{target.name:>8} {'yes' if outcome.inside else 'no':>6} {100 * outcome.miss:6.2f} "
        f"{100 * outcome.second_miss:7.2f} {outcome.steps:6d} {outcome.seconds:8.1f} {outcome.confident:9.3f}"
    )
    parts = [
        f"{name}{'' if name in outcome.unaffected else '*'} {d.value:+.2f}/{_number(d.floor)}"
        for name, d in outcome.distances.items()
    ]
    print(f"         distance/floor by digit (* is to change): {'  '.join(parts)}")
    print(f"         step:fraction: {'  '.join(f'{step}:{value:.3f}' for step, value, _ in curve)}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.debias", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two targets, fewer samples")
    parser.add_argument("--targets", nargs="*", help="of parity, odd, uniform, ramp, halved (default: all)")
    parser.add_argument("--samples", type=int, default=None, help="that judge each flow (default: 6,000)")
    parser.add_argument("--base", type=Path, help="checkpoint of the base (default: the cached one)")
    parser.add_argument("--keep", type=Path, help="folder for the steered flows")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    base = load_checkpoint(options.base) if options.base else digit_base()
    if not isinstance(base, Glow):
        raise SystemExit(f"{options.base} holds no Glow")
    classifier, second = digit_classifier(), digit_classifier(recipe=ClassifierRecipe(seed=SECOND_SEED))
    judge = Judge(base, classifier, second, options.samples or (3000 if options.quick else 6000))
    chosen = targets(classifier, judge.fractions)
    names = options.targets or (["parity", "halved"] if options.quick else list(chosen))

    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"base: {' '.join(f'{value:.3f}' for value in judge.fractions)}, sure of {judge.confident:.3f} of samples")
    print("  target inside   miss  second  steps  seconds      sure")
    outcomes = {}
    for seed, name in enumerate(names):
        target = chosen[name]
        start = time.monotonic()
        result = steer(base, [target.constraint], SteeringParameters(), n_bits=N_BITS, seed=seed)
        seconds = time.monotonic() - start
        outcomes[name] = judge(cast(Flow, result.flow), target, result.met, result.steps, seconds)
        shown = max(target.wanted, key=lambda key: abs(target.wanted[key] - result.before[0].values[key]))
        column = f"{target.constraint.name}.{shown}"
        curve = [(int(row["step"]), row[column], int(row["n"])) for row in result.history if "n" in row]
        show(target, outcomes[name], curve)
        if options.keep and isinstance(result.flow, Glow):
            options.keep.mkdir(parents=True, exist_ok=True)
            save_checkpoint(options.keep / f"{name}.safetensors", result.flow)
    print(json.dumps(summary(outcomes, judge.confident)))


def summary(outcomes: dict[str, Outcome], confident: float) -> dict[str, float | int | None]:
    """The figures of the last line."""
    known = [
        (name in outcome.unaffected, distance)
        for outcome in outcomes.values()
        for name, distance in outcome.distances.items()
        if distance.floor is not None
    ]
    unaffected, every = [distance for still, distance in known if still], [distance for _, distance in known]
    return {
        "targets": len(outcomes),
        "inside": sum(outcome.inside and outcome.met for outcome in outcomes.values()),
        "worst_miss": max(outcome.miss for outcome in outcomes.values()),
        "worst_miss_second_judge": max(outcome.second_miss for outcome in outcomes.values()),
        "unaffected": len(unaffected),
        "unaffected_within_noise": sum(bool(distance.within_noise) for distance in unaffected),
        "all_digits": len(every),
        "all_digits_within_noise": sum(bool(distance.within_noise) for distance in every),
        "kid_median": _median([distance.value for distance in unaffected]),
        "kid_worst": max((distance.value for distance in unaffected), default=None),
        "kid_floor_median": _median([distance.floor for distance in unaffected if distance.floor is not None]),
        "sure_base": confident,
        "sure_worst": min(outcome.confident for outcome in outcomes.values()),
        "median_seconds": _median([outcome.seconds for outcome in outcomes.values()]),
        "median_steps": _median([float(outcome.steps) for outcome in outcomes.values()]),
    }


def _median(values: list[float]) -> float | None:
    return float(torch.tensor(values).median()) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    main()
