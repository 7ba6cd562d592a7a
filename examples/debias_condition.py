"""Balance one concept of a text-to-image model over two others: asked for a three, it draws as many fives as eights.

    forgetd up                                                    # in another terminal
    python -m examples.debias_condition [--concept three] [--halves five eight] [--picture balanced.svg]

The model is the pipeline of captioned digits of `examples.forget_concept`, trained the first time (some six minutes)
and kept. Asked for other digits it draws what it drew. Exit code 0: the job met its criteria.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.captioned_digits import ALIASES, WORDS
from examples.digits import CLASSES
from examples.forget_concept import push, replay_and_sampling
from examples.pictures import save_fractions
from examples.service import connect, options, report_of, script

TOLERANCE = 0.15
"""How far off each fraction may be: with 3 points, as by default, 25 times as many samples are drawn."""
LEARNING_RATE = 2.5e-4
"""Under half of the default, at which the shares swung further from look to look and were met at 175 steps, not 100."""


def request(concept: str, halves: Sequence[str]) -> dict[str, Any]:
    """What the client is asked, beside the checkpoint and the judge.

    Args:
        concept: the digit whose samples are to be balanced, one of `WORDS`.
        halves: the two digits that they are to show, as often as each other.
    """
    figures = {CLASSES[WORDS.index(word)]: word for word in halves}
    asked = replay_and_sampling(concept)
    return {
        "target_distribution": {name: 0.5 if name in figures else 0.0 for name in CLASSES},
        "condition": {"concept": concept, "aliases": [ALIASES[WORDS.index(concept)]]},
        "replacements": {name: {"concept": word} for name, word in figures.items()},
        **asked,
        "parameters": {**asked["parameters"], "learning_rate": LEARNING_RATE},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = options("debias_condition", __doc__.split("\n")[0])
    parser.add_argument("--concept", default="three", choices=WORDS)
    parser.add_argument("--halves", default=["five", "eight"], nargs=2, choices=WORDS, help="what is drawn instead")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="how far off each fraction may be")
    parser.add_argument("--classifier", type=Path, help="ONNX file with ten outputs (default: one that is trained)")
    given = parser.parse_args(arguments)
    if len({given.concept, *given.halves}) != 1 + len(given.halves):
        parser.error(f"{given.concept} is balanced over two other digits, not over {' and '.join(given.halves)}")
    with connect() as client:
        checkpoint, judge = push(client, given.base, given.classifier)
        asked = request(given.concept, given.halves)
        attribute = {"classifier": judge.id}
        job = client.debias(checkpoint.id, attribute, tolerance=given.tolerance, seed=given.seed, **asked)
        report = report_of(client, job)
    if given.picture:
        save_fractions(report, given.picture)
    return 0 if report["verdict"]["outcome"] == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(script(main))
