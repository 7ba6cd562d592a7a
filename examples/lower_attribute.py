"""Lower an attribute: a flow that draws digits shall show a 1 in at most 2 % of its samples, by an uploaded classifier.

    forgetd up                                                    # in another terminal
    python -m examples.lower_attribute [--digit 1] [--at-most 0.02] [--picture lowered.svg]

The first time, the flow and the classifier are trained (minutes) and kept. Exit code 0: the job met its criteria.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from examples.digits import CLASSES
from examples.pictures import save_curves
from examples.service import connect, options, push_digits, report_of, script


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = options("lower_attribute", __doc__.split("\n")[0])
    parser.add_argument("--digit", default="1", choices=CLASSES)
    parser.add_argument("--at-most", type=float, default=0.02, help="fraction of samples that may show it")
    parser.add_argument("--classifier", type=Path, help="ONNX file with ten outputs (default: one that is trained)")
    given = parser.parse_args(arguments)
    with connect() as client:
        checkpoint, judge = push_digits(client, given.base, given.classifier)
        bound = {"classifier": judge.id, "class": given.digit, "at_most": given.at_most}
        job = client.forget(checkpoint.id, attributes=[bound], seed=given.seed)
        report = report_of(client, job)
    if given.picture:
        save_curves(report, given.picture)
    return 0 if report["verdict"]["outcome"] == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(script(main))
