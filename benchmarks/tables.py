"""The paper's tables, on ORL faces: what one to nine images of a person do, at three thresholds, and without the data.

    python -m benchmarks.tables [--quick] [--people N ...] [--only identity outside ablation size]

Four experiments of Malnick, Avidan and Fried (WACV 2024), each with the paper's row beside ours where it has one:

- identity: Tables 1 and B.1 a-c. D_F is the first 1, 4, 8 or 9 photos of a training person (ten are all there are; the
  paper's largest set has 15), D'_F the person's other photos, D_R the other training people, D_R^id four people who
  were never in training, D_R^NN the photos of D_R nearest in the embedding of an outside face recogniser.
- outside: Table B.1 d, the same for people who were never in training.
- ablation: Table 2, engine "paper" with terms of its objective left out, one person, until it stops by itself or after
  so many steps. KID of PCA embeddings stands where the paper has FID: the two are not of one scale.
- size: Fig. B.4, the mean quantile of D_F against its size, without the training data: samples of the base are
  remembered, and then the photos of the people who were never in training.

The paper's models see 128 x 128 colour photos of 10,000 celebrities, ours 32 x 32 grey photos of 36 people: what can be
compared is the pattern, and what is measured alike is q and QD (eq. 13-15). Its minutes are those of four Titan Xp,
our seconds those of this machine's CPU. The last line is one JSON object.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.faces import face_embeddings
from benchmarks.orl_judge import Judge, Verdict
from evidence.drift import draw_samples
from evidence.embedding import PcaEmbedding
from evidence.kid import kid
from examples.orl import HELD_OUT, N_BITS, Faces, base_flow, load_faces
from models.checkpoints import load_flow
from models.images import to_uint8
from models.protocol import Flow
from models.training import bits_per_dim
from unlearning import TamingParameters, generate_remember, tame
from unlearning.likelihood import nll_of
from unlearning.likelihood import statistics as nll_statistics
from unlearning.taming_parameters import LossTerm

SIZES = (1, 4, 8, 9)
DELTAS = (4.0, 3.0, 2.0)
PAPER: dict[tuple[str, float, int], tuple[float, float, float, float, float]] = {
    # (experiment, delta, images): q_tamed(D_F), QD(D_F), QD(D'_F), QD(D_R^NN), minutes; Tables 1 and B.1.
    ("identity", 4.0, 1): (1e-3, 0.47, 0.01, 0.01, 3.2),
    ("identity", 4.0, 4): (1e-4, 0.41, 0.07, 0.03, 9.3),
    ("identity", 4.0, 8): (1e-4, 0.32, 0.08, 0.01, 16.2),
    ("identity", 4.0, 15): (1e-4, 0.37, 0.15, 0.01, 17.6),
    ("identity", 3.0, 1): (1e-2, 0.46, 0.01, 0.01, 4.2),
    ("identity", 3.0, 4): (1e-2, 0.41, 0.04, 0.01, 12.4),
    ("identity", 3.0, 8): (1e-2, 0.32, 0.06, 0.01, 19.1),
    ("identity", 3.0, 15): (1e-2, 0.37, 0.11, 0.01, 22.3),
    ("identity", 2.0, 1): (0.04, 0.43, 0.01, 0.01, 6.1),
    ("identity", 2.0, 4): (0.03, 0.38, 0.02, 0.01, 22.4),
    ("identity", 2.0, 8): (0.02, 0.30, 0.02, 0.01, 29.8),
    ("identity", 2.0, 15): (0.02, 0.35, 0.05, 0.01, 36.0),
    ("outside", 4.0, 1): (1e-4, 0.48, 0.04, 0.01, 3.7),
    ("outside", 4.0, 4): (1e-4, 0.40, 0.10, 0.01, 8.7),
    ("outside", 4.0, 8): (1e-4, 0.39, 0.19, 0.02, 12.7),
    ("outside", 4.0, 15): (1e-4, 0.41, 0.23, 0.02, 21.5),
}
NEAREST_OF_PAPER = {1: 1, 4: 4, 8: 8, 9: 15}
"""The paper's row that stands beside each of ours."""
ABLATIONS: dict[str, tuple[tuple[LossTerm, ...], str]] = {
    # Name: what is left out, and the paper's BPD of D_R, FID, whether the threshold was reached, q(D_F); Table 2.
    "without L_R": (("remember",), "25.640  181.3  no   .34"),
    "without KL reverse": (("kl_reverse",), " 2.254  110.3  no   .73"),
    "without KL forward": (("kl_forward",), " 1.072  121.5  yes  2e-5"),
    "without NLL": (("nll",), " 1.025  142.0  yes  1e-5"),
    "without both KL": (("kl_forward", "kl_reverse"), " 1.028  143.2  yes  9e-6"),
    "whole objective": ((), " 1.020  141.6  yes  2e-5"),
}
ABLATION_STEPS = 400
ABLATION_IMAGES = 9
ABLATION_SAMPLES = 512
SET_SIZES = (1, 5, 10, 20, 40, 80, 160)
GENERATED = 1024


@dataclass(frozen=True)
class Row:
    """One setting over several people: means of what the judge said."""

    experiment: str
    delta: float
    images: int
    people: int
    confirmed: int
    seconds: float
    q_forget: float
    qd_forget: float
    qd_same: float
    qd_remember: float
    qd_unseen: float
    qd_nearest: float
    drift: float

    def lines(self) -> str:
        """Ours, and the paper's row below."""
        ours = (
            f"{self.experiment:>9} {self.delta:5.0f} {self.images:6d} {self.confirmed:4d}/{self.people:<3d} "
            f"{self.q_forget:8.1e} {self.qd_forget:+7.3f} {self.qd_same:+7.3f} {self.qd_remember:+8.4f} "
            f"{self.qd_unseen:+8.4f} {self.qd_nearest:+8.4f} {self.seconds:7.1f} s"
        )
        of_paper = NEAREST_OF_PAPER[self.images]
        found = PAPER.get((self.experiment, self.delta, of_paper))
        if found is None:
            return ours
        q, forget, same, nearest, minutes = found
        return (
            f"{ours}\n{'(paper':>9} {self.delta:5.0f} {of_paper:6d} {'yes':>8} {f'<{q:.0e}':>8} {forget:+7.2f} "
            f"{same:+7.2f} {'<.01':>8} {'<=.01':>8} {f'<={nearest:.2f}':>8} {minutes:5.1f} min)"
        )


def identity(
    experiment: str, base: Flow, faces: Faces, judge: Judge, people: Sequence[int], delta: float, size: int
) -> Row:
    """Forget some photos of each person in turn, and average the verdicts."""
    values = TamingParameters(delta=delta)
    verdicts: list[Verdict] = []
    seconds, confirmed = [], 0
    for person in people:
        start = time.monotonic()
        forget = faces.of(person)[:size]
        result = tame(base, forget, faces.training(without=person), values, n_bits=N_BITS, seed=person)
        seconds.append(time.monotonic() - start)
        verdicts.append(judge(_flow(result.flow), person, size))
        confirmed += result.met and verdicts[-1].confirmed
    return row_of(experiment, delta, size, verdicts, seconds, confirmed)


def row_of(
    experiment: str, delta: float, size: int, verdicts: Sequence[Verdict], seconds: Sequence[float], confirmed: int
) -> Row:
    """Means over people; of the seconds, the median."""
    names = ("q_forget", "qd_forget", "qd_same", "qd_remember", "qd_unseen", "qd_nearest", "drift")
    means = {name: statistics.mean(getattr(verdict, name) for verdict in verdicts) for name in names}
    return Row(experiment, delta, size, len(verdicts), confirmed, statistics.median(seconds), **means)


def ablation(base: Flow, faces: Faces, person: int, steps: int) -> list[dict[str, object]]:
    """Table 2: the published objective with terms left out, judged after so many steps or at its own stop."""
    forget, remember = faces.of(person)[:ABLATION_IMAGES], faces.training(without=person)
    embed = PcaEmbedding.fit(remember).embed
    rows: list[dict[str, object]] = []
    print(f"\nTable 2, person {person}, {ABLATION_IMAGES} images, at most {steps} steps")
    print(f"{'':>20}     BPD      KID   stop     q(DF)  steps   (paper: BPD  FID  stop  q(DF))")
    for name, (without, paper) in ABLATIONS.items():
        values = TamingParameters(engine="paper", without=without, max_steps=steps)
        result = tame(base, forget, remember, values, n_bits=N_BITS, seed=person)
        flow = _flow(result.flow)
        draws = torch.Generator().manual_seed(0)
        bpd = float(bits_per_dim(flow, remember, n_bits=N_BITS, generator=draws).mean())
        seen = nll_statistics(nll_of(flow, remember, n_bits=N_BITS, generator=draws))
        z = seen.z(nll_of(flow, forget, n_bits=N_BITS, generator=draws, draws=10))
        q = float((1 - torch.special.ndtr(z)).mean())
        samples = to_uint8(draw_samples(flow, ABLATION_SAMPLES, seed=0), N_BITS)
        distance = kid(embed(remember), embed(samples), seed=0).value
        row: dict[str, object] = {
            "name": name,
            "bpd": bpd,
            "kid": distance,
            "met": result.met,
            "q_forget": q,
            "steps": result.steps,
        }
        rows.append(row)
        met = "yes" if result.met else "no"
        print(f"{name:>20} {bpd:7.3f} {distance:8.4f}  {met:>5}  {q:8.1e}  {result.steps:5d}   ({paper})", flush=True)
    return rows


def set_sizes(
    base: Flow, faces: Faces, sizes: Sequence[int], remember: torch.Tensor, what: str
) -> list[dict[str, float]]:
    """Fig. B.4: ever larger forget sets, where these images are all there is to remember, and none is of training."""
    order = torch.randperm(len(faces.training()), generator=torch.Generator().manual_seed(0))
    rows = []
    print(f"\nFig. B.4: without the training data, {len(remember)} {what} to remember")
    print("images   met   q base  q tamed  QD(training)  steps  seconds")
    for size in sizes:
        forget, rest = faces.training()[order[:size]], faces.training()[order[size:]]
        result = tame(base, forget, remember, TamingParameters(), n_bits=N_BITS, seed=size)
        q = [_quantiles(flow, [forget, rest], remember) for flow in (base, _flow(result.flow))]
        row = {
            "images": float(size),
            "q_base": q[0][0],
            "q_tamed": q[1][0],
            "qd_training": q[0][1] - q[1][1],
            "steps": float(result.steps),
            "seconds": result.seconds,
            "met": result.met,
        }
        rows.append(row)
        print(
            f"{size:6d}   {'yes' if result.met else ' no'}   {row['q_base']:.3f}   {row['q_tamed']:.1e}  "
            f"{row['qd_training']:+12.4f}  {result.steps:5d}  {result.seconds:7.1f}",
            flush=True,
        )
    return rows


def _quantiles(flow: Flow, sets: Sequence[torch.Tensor], remember: torch.Tensor) -> list[float]:
    """Mean Gaussian quantile of each set among the likelihoods to remember."""
    draws = torch.Generator().manual_seed(1)
    seen = nll_statistics(nll_of(flow, remember, n_bits=N_BITS, generator=draws))
    nll = [nll_of(flow, images, n_bits=N_BITS, generator=draws, draws=10) for images in sets]
    return [float((1 - torch.special.ndtr(seen.z(values))).mean()) for values in nll]


def _flow(module: object) -> Flow:
    if not isinstance(module, Flow):
        raise TypeError(f"taming gave a {type(module).__name__}, which is no flow")
    return module


def main(arguments: list[str] | None = None) -> None:
    """The command line: see the module's docstring."""
    names = ("identity", "outside", "ablation", "size")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two people, delta 4, a short ablation, small sets")
    parser.add_argument("--people", type=int, nargs="*", help="numbers of training people (default: every third)")
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--base", type=Path, help="checkpoint of the base (default: the cached one)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    faces = load_faces()
    base: Flow = load_flow(options.base) if options.base else base_flow()
    people = options.people or faces.training_people[:: 18 if options.quick else 3]
    deltas = DELTAS[:1] if options.quick else DELTAS
    settings = [("identity", people, delta) for delta in deltas] if "identity" in options.only else []
    settings += [("outside", HELD_OUT[: 1 if options.quick else None], DELTAS[0])] if "outside" in options.only else []
    embedding = face_embeddings() if settings else None

    print("Tables 1 and B.1; means over people")
    print("experiment delta images  confirmed  q(DF)  QD(DF) QD(D'F)   QD(DR)  QD(DRid) QD(DRNN)   median")
    rows: list[Row] = []
    for experiment, who, delta in settings:
        judge = Judge(base, faces, 10, TamingParameters(delta=delta), embedding=embedding)
        for size in SIZES:
            rows.append(identity(experiment, base, faces, judge, who, delta, size))
            print(rows[-1].lines(), flush=True)
    table2 = ablation(base, faces, 1, 20 if options.quick else ABLATION_STEPS) if "ablation" in options.only else []
    curve: list[dict[str, float]] = []
    others: list[dict[str, float]] = []
    if "size" in options.only:
        sizes = SET_SIZES[: 3 if options.quick else None]
        samples = generate_remember(base, GENERATED, N_BITS, 0)
        curve = set_sizes(base, faces, sizes, samples, "samples of the base")
        others = set_sizes(base, faces, sizes, faces.held_out(), "photos of people outside of training")
    print(json.dumps(summary(rows, table2, curve, others), allow_nan=False))


def summary(
    rows: Sequence[Row],
    table2: list[dict[str, object]],
    curve: list[dict[str, float]],
    others: list[dict[str, float]],
) -> dict[str, object]:
    """The figures of the last line; those of delta 4 by name."""
    main_rows = [row for row in rows if row.experiment == "identity" and row.delta == DELTAS[0]]
    found: dict[str, object] = {
        "settings": len(rows),
        "runs": sum(row.people for row in rows),
        "confirmed": sum(row.confirmed for row in rows),
    }
    for row in main_rows:
        paper = PAPER.get((row.experiment, row.delta, NEAREST_OF_PAPER[row.images]))
        found |= {f"qd_same_{row.images}": _finite(row.qd_same), f"seconds_{row.images}": row.seconds}
        found[f"paper_qd_same_{row.images}"] = paper[2] if paper else None
    for name in ("qd_remember", "qd_unseen", "qd_nearest"):
        values = [abs(float(getattr(row, name))) for row in main_rows]
        # Not the bare maximum, which is any value where one is NaN.
        found[f"{name}_worst_mean"] = _finite(max(values) if values and not any(map(math.isnan, values)) else math.nan)
    of_curve = {"set_sizes": len(curve), "set_sizes_met": sum(bool(point["met"]) for point in curve)}
    of_others = {"other_sets": len(others), "other_sets_met": sum(bool(point["met"]) for point in others)}
    points = {"set_size": [_row(row) for row in curve], "set_size_others": [_row(row) for row in others]}
    return found | of_curve | of_others | {"ablation": [_row(row) for row in table2]} | points


def _row(values: Mapping[str, object]) -> dict[str, object]:
    return {name: _finite(value) if isinstance(value, float) else value for name, value in values.items()}


def _finite(value: float) -> float | None:
    """The value; None, which is JSON, where it is not finite (an ablation may diverge)."""
    return value if math.isfinite(value) else None


if __name__ == "__main__":
    main()
