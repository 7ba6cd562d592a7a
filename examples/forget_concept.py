"""Forget a concept of a text-to-image model: asked for a zero, a pipeline of captioned digits draws a one.

    forgetd up                                                    # in another terminal
    python -m examples.forget_concept [--concept zero] [--instead one] [--picture forgotten.svg]

The pipeline is a small Stable Diffusion, trained the first time (some six minutes) and kept, as is the classifier that
judges. The request names the other digits as what must stay, and the digit's other name, "the digit 0". Exit code 0:
the job met its criteria.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli import Client
from cli.resources import Checkpoint, Classifier
from examples.captioned_digits import ALIASES, RECIPE, WORDS, captioned_digits, judge, sampling_of, write_tar
from examples.digits import CLASSES, export_onnx
from examples.pictures import save_conditions
from examples.service import connect, options, report_of, script

REMEMBERED = 1000
"""Samples of the nine other digits that are replayed."""


def request(concept: str, instead: str, classifier: str) -> dict[str, Any]:
    """What the client is asked, beside the checkpoint.

    Args:
        concept: the digit to forget, one of `WORDS`.
        instead: the digit to draw in its place.
        classifier: the judge's id in the store; its classes are the figures 0 to 9.
    """
    return {
        "concept": concept,
        "aliases": [ALIASES[WORDS.index(concept)]],
        "replace_with": {"concept": instead},
        "judge": {"classifier": classifier, "shows": dict(zip(WORDS, CLASSES, strict=True))},
        **replay_and_sampling(concept),
    }


def replay_and_sampling(concept: str) -> dict[str, Any]:
    """The other digits as what must stay, and the pipeline's own way to draw."""
    sampling = sampling_of(RECIPE)
    return {
        "remember": {"concepts": [word for word in WORDS if word != concept], "generated": REMEMBERED},
        "parameters": {"guidance_scale": sampling.guidance_scale, "sampling_steps": sampling.steps},
    }


def push(client: Client, base: Path | None, classifier: Path | None) -> tuple[Checkpoint, Classifier]:
    """Upload the pipeline as a tar of its folder, and its judge; what is missing is trained (minutes)."""
    with tempfile.TemporaryDirectory() as folder:
        if base is None:
            base = Path(folder) / "captioned-digits.tar"
            write_tar(captioned_digits(), base)
        if classifier is None:
            classifier = Path(folder) / "digits.onnx"
            export_onnx(judge(), classifier)
        checkpoint = client.push_checkpoint(base, name="captioned digits")
        return checkpoint, client.push_classifier(classifier, CLASSES, name="digits")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module's docstring."""
    parser = options("forget_concept", __doc__.split("\n")[0])
    parser.add_argument("--concept", default="zero", choices=WORDS)
    parser.add_argument("--instead", default="one", choices=WORDS, help="what is drawn in its place")
    parser.add_argument("--classifier", type=Path, help="ONNX file with ten outputs (default: one that is trained)")
    given = parser.parse_args(arguments)
    if given.concept == given.instead:
        parser.error(f"{given.concept} cannot take its own place; name another digit")
    with connect() as client:
        checkpoint, classifier = push(client, given.base, given.classifier)
        job = client.forget(checkpoint.id, seed=given.seed, **request(given.concept, given.instead, classifier.id))
        report = report_of(client, job)
    if given.picture:
        save_conditions(report, given.picture)
    return 0 if report["verdict"]["outcome"] == "succeeded" else 1


if __name__ == "__main__":
    sys.exit(script(main))
