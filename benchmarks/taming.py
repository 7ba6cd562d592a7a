"""Does the fast engine forget any person, sooner and with less damage than the released recipe of flow taming?

    python -m benchmarks.taming [--quick]

Each of the 36 training people of the ORL faces in turn: D_F is five photos, D_R the other people's training photos,
D'_F the person's other five photos, D_R^id the four people who were never in training. Baseline: engine "paper", the
released recipe (Adam 5e-5 on every layer, batch 8 + 8, statistics over up to 1,024 images every 10 iterations,
two-sided stop), re-implemented. Both sides start from the same base, sets and delta and are judged by the same judge:
likelihoods over ten noise draws that neither has seen, common to base and tamed flow, mu_R and sigma_R of the tamed
flow (eq. 13-15).

The recipe runs on a few people only (`--paper-people`), for at most `--paper-cap` seconds each; where it is not
confirmed by then, the ratio of times is a lower bound. Drift is the mean over D_R^id of
|nll_tamed - nll_base| / sigma_base. The last line is one JSON object.

Where the gain comes from is measured on the recipe's own runs (`benchmarks.counting`). Removed waste: its time over
what would be left of it with one confirmation as the only pass without a gradient, and no step after the first that
found all of D_F past the criterion, one-sided. Method: the rest of the ratio, of which fewer steps are one factor and
the price of a step, all that goes with it included, the other. Of a run that the cap ended, as with `--quick`, only the
part that ran is broken down, and its steps are fewer than it needs: then the method's factor is a lower bound.
"""

import argparse
import copy
import json
import math
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from benchmarks.counting import CountedGlow, Spent, without_waste
from benchmarks.orl_judge import Judge, Verdict
from examples.orl import HELD_OUT, N_BITS, PEOPLE, Faces, base_flow, load_faces
from models.checkpoints import load_checkpoint
from models.glow import Glow
from unlearning import Interrupted, Step, TamingParameters, tame

FORGET_PHOTOS = 5
"""Photos of the person that are forgotten; the others are D'_F."""


@dataclass(frozen=True)
class Run:
    """One engine on one person."""

    seconds: float
    cpu_seconds: float
    steps: int
    met: bool
    verdict: Verdict
    spent: Spent
    needed: int
    """The first step that found all of D_F past the criterion on its own noise; `steps` where none did."""
    confirmation: int
    """Images, times noise draws, that one confirmation evaluates."""

    @property
    def confirmed(self) -> bool:
        """Whether it stopped by itself, and the judge agrees."""
        return self.met and self.verdict.confirmed

    @property
    def lean_seconds(self) -> float:
        """Seconds without waste, where this is the recipe's run; the module says what that is."""
        return without_waste(self.spent, self.steps, self.needed, self.confirmation)


class Clock:
    """A callback that ends a run after so many seconds and keeps the weights it had reached."""

    def __init__(self, seconds: float, bound: float) -> None:
        self._end, self._bound = time.monotonic() + seconds, bound
        self.weights: dict[str, Tensor] = {}
        self.steps = 0
        self.passed: int | None = None

    def __call__(self, step: Step) -> None:
        """End the run once the time is over."""
        self.steps = step.step
        if self.passed is None and step.metrics.get("z_min", -math.inf) >= self._bound:
            self.passed = step.step
        if time.monotonic() >= self._end:
            prefix = "weight."
            tensors = step.snapshot().tensors
            self.weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            raise Interrupted


def run_engine(base: Glow, faces: Faces, person: int, values: TamingParameters, judge: Judge, cap: float) -> Run:
    """Tame one person away, for at most `cap` seconds, and judge what came out."""
    forget, remember = faces.of(person)[:FORGET_PHOTOS], faces.training(without=person)
    clock = Clock(cap, values.delta * (1 - values.tolerance))
    counted = CountedGlow.of(base)
    tamed: object
    wall, cpu = time.monotonic(), time.process_time()
    try:
        result = tame(counted, forget, remember, values, n_bits=N_BITS, seed=person, callback=clock)
        steps, met, tamed = result.steps, result.met, result.flow
    except Interrupted:
        steps, met, tamed = clock.steps, False, None
    seconds, cpu_seconds, spent = time.monotonic() - wall, time.process_time() - cpu, counted.tally.spent()
    if tamed is None:
        tamed = copy.deepcopy(base)
        tamed.load_state_dict({**tamed.state_dict(), **clock.weights})
    if not isinstance(tamed, Glow):
        raise TypeError(f"taming a Glow gave a {type(tamed).__name__}")
    confirmation = len(forget) * values.confirmation_draws + min(len(remember), values.statistics_images)
    needed = clock.passed if clock.passed is not None else steps
    verdict = judge(tamed, person, FORGET_PHOTOS)
    return Run(seconds, cpu_seconds, steps, met, verdict, spent, needed, confirmation)


def show(engine: str, person: int, run: Run) -> None:
    """One line of the table."""
    v = run.verdict
    print(
        f"{engine:>6} {person:4d} {'yes' if run.confirmed else 'no':>5} {run.steps:6d} {run.seconds:8.1f} "
        f"{run.cpu_seconds:8.1f} {v.z_min:7.2f} {v.qd_forget:+8.3f} {v.qd_same:+8.3f} {v.qd_remember:+8.4f} "
        f"{v.qd_unseen:+8.3f} {v.drift:7.3f}",
        flush=True,
    )


def show_breakdown(figures: dict[str, object]) -> None:
    """Where the gain comes from, in words."""
    bound = ", lower bounds of the method where the recipe is unfinished" if figures["speedup_is_lower_bound"] else ""
    print(f"where the gain comes from, people of both engines{bound}:")
    for name in ("gain_removed_waste", "gain_method", "gain_fewer_steps", "gain_price_of_a_step"):
        factor = figures[name]
        shown = f"{factor:6.2f} x" if isinstance(factor, float) else "     -"
        print(f"  {name.removeprefix('gain_').replace('_', ' '):>16} {shown}")
    for name in ("seconds_by_part", "images_by_part"):
        print(f"  {name.replace('_', ' ')}: {json.dumps(figures[name])}")


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.taming", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two people, one of them by the recipe for 12 s")
    parser.add_argument("--people", type=int, nargs="*", help="numbers (default: all 36 training people)")
    parser.add_argument("--paper-people", type=int, default=None, help="how many the recipe runs on (default: 3)")
    parser.add_argument("--paper-cap", type=float, default=None, help="seconds a person for the recipe (default: 600)")
    parser.add_argument(
        "--base", type=Path, help="checkpoint of the base (default: the cached one, trained if need be)"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    faces = load_faces()
    base = load_checkpoint(options.base) if options.base else base_flow()
    if not isinstance(base, Glow):
        raise SystemExit(f"{options.base} holds no Glow")
    training = faces.training_people
    people = options.people or ([training[0], training[len(training) // 2]] if options.quick else training)
    paper_people = options.paper_people if options.paper_people is not None else (1 if options.quick else 3)
    cap = options.paper_cap if options.paper_cap is not None else (12.0 if options.quick else 600.0)
    values, released = TamingParameters(), TamingParameters(engine="paper", max_steps=100_000)
    judge = Judge(base, faces, 3 if options.quick else 10, values)
    tame(base, faces.of(people[0])[:1], faces.training()[:40], TamingParameters(max_steps=1), n_bits=N_BITS, seed=0)

    print(f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{PEOPLE - len(HELD_OUT)} training people; {len(people)} forgotten in turn, five photos each")
    print("engine  who    ok  steps  seconds      cpu   z min   QD(DF)  QD(D'F)   QD(DR) QD(DRid)   drift")
    spread = people[:: max(1, len(people) // max(1, paper_people))][:paper_people]
    ours: dict[int, Run] = {}
    paper: dict[int, Run] = {}
    for person in people:
        ours[person] = run_engine(base, faces, person, values, judge, 3600.0)
        show("fast", person, ours[person])
        if person in spread:
            paper[person] = run_engine(base, faces, person, released, judge, cap)
            show("paper", person, paper[person])
    figures = summary(ours, paper)
    show_breakdown(figures)
    print(json.dumps(figures, allow_nan=False))


def summary(ours: dict[int, Run], paper: dict[int, Run]) -> dict[str, object]:
    """The figures of the last line."""
    verdicts = [run.verdict for run in ours.values()]
    confirmed_by_paper = [person for person, run in paper.items() if run.confirmed]
    drift = statistics.median(ours[person].verdict.drift for person in paper) if paper else None
    paper_drift = statistics.median(run.verdict.drift for run in paper.values()) if paper else None
    speedup = statistics.median(run.seconds / ours[person].seconds for person, run in paper.items()) if paper else None
    return {
        "people": len(ours),
        "confirmed": sum(run.confirmed for run in ours.values()),
        "median_seconds": statistics.median(run.seconds for run in ours.values()),
        "median_cpu_seconds": statistics.median(run.cpu_seconds for run in ours.values()),
        "median_steps": statistics.median(run.steps for run in ours.values()),
        "z_min_worst": min(verdict.z_min for verdict in verdicts),
        "qd_forget_mean": statistics.mean(verdict.qd_forget for verdict in verdicts),
        "qd_held_out_mean": statistics.mean(verdict.qd_same for verdict in verdicts),
        "qd_remember_median": statistics.median(abs(verdict.qd_remember) for verdict in verdicts),
        "qd_remember_worst": max(abs(verdict.qd_remember) for verdict in verdicts),
        "qd_unseen_median": statistics.median(abs(verdict.qd_unseen) for verdict in verdicts),
        "qd_unseen_worst": max(abs(verdict.qd_unseen) for verdict in verdicts),
        "drift_median": statistics.median(verdict.drift for verdict in verdicts),
        "speedup": speedup,
        "speedup_is_lower_bound": len(confirmed_by_paper) < len(paper),
        "paper_people": len(paper),
        "paper_confirmed": len(confirmed_by_paper),
        "drift_median_same_people": drift,
        "paper_drift_median": paper_drift,
        "drift_ratio": drift / paper_drift if drift is not None and paper_drift else None,
        "confirmed_same_people": sum(ours[person].confirmed for person in paper),
        **breakdown({person: ours[person] for person in paper}, paper, speedup),
    }


def breakdown(ours: dict[int, Run], paper: dict[int, Run], speedup: float | None) -> dict[str, object]:
    """Where the gain on the people of both comes from: the two gains multiply to `speedup`, the last two to the second.

    Seconds and images are sums over these people.
    """
    removed = steps = method = price = None
    if speedup is not None:
        removed = statistics.median(run.seconds / run.lean_seconds for run in paper.values())
        steps = statistics.median(run.needed / max(1, ours[person].steps) for person, run in paper.items())
        method = speedup / removed
        price = method / steps
    return {
        "gain_removed_waste": removed,
        "gain_method": method,
        "gain_fewer_steps": steps,
        "gain_price_of_a_step": price,
        "seconds_by_part": {"fast": _total(ours, "seconds"), "paper": _total(paper, "seconds")},
        "images_by_part": {"fast": _total(ours, "images"), "paper": _total(paper, "images")},
    }


def _total(runs: dict[int, Run], what: Literal["seconds", "images"]) -> dict[str, float]:
    spent: list[dict[str, float]] = [{**getattr(run.spent, what)} for run in runs.values()]
    return {part: sum(values.get(part, 0) for values in spent) for part in sorted({part for s in spent for part in s})}


if __name__ == "__main__":
    main()
