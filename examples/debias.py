"""Debias a flow that draws digits: 70 % odd ones, each digit within 3 points, by an uploaded classifier.

    forgetd up                                                    # in another terminal
    python -m examples.debias [--odd 0.7] [--picture debiased.svg]

`--odd` is the share of 1, 3, 5, 7 and 9 together; with 0.5 all ten digits are asked for equally often. The first time,
the flow and the classifier are trained (minutes) and kept. Exit code 0: the job met its criteria.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from examples.digits import CLASSES
from examples.pictures import save_fractions
from examples.service import connect, options, push_digits, report_of, script


def target(odd: float) -> dict[str, float]:
    """A fraction for every digit: odd ones share `odd` evenly, even ones the rest."""
    return {name: (odd if int(name) % 2 else 1 - odd) / 5 for name in CLASSES}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = options("debias", __doc__.split("\n")[0])
    parser.add_argument("--odd", type=float, default=0.7, help="share of the odd digits together")
    parser.add_argument("--tolerance", type=float, help="how far off each fraction may be (default: 0.03)")
    parser.add_argument("--classifier", type=Path, help="ONNX file with ten outputs (default: one that is trained)")
    given = parser.parse_args(arguments)
    with connect() as client:
        checkpoint, judge = push_digits(client, given.base, given.classifier)
        asked = target(given.odd)
        job = client.debias(checkpoint.id, {"classifier": judge.id}, asked, tolerance=given.tolerance, seed=given.seed)
        report = report_of(client, job)
    if given.picture:
        save_fractions(report, given.picture)
    return 0 if report["verdict"]["outcome"] == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(script(main))
