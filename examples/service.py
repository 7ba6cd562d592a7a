"""What the scripts that call a service share: which service, what they upload, how a job ends and what it reports.

The service is the one that ``forgetd up`` runs in this folder, or the one in FORGETD_URL and FORGETD_KEY.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli import Client, ClientError
from cli.errors import job_error
from cli.exits import exit_code_of
from cli.profile import resolve
from cli.resources import Checkpoint, Classifier, Job
from examples.digits import CLASSES, base_path, digit_base, digit_classifier, export_onnx

__all__ = ["connect", "options", "push_digits", "report_of", "script"]


def options(module: str, description: str) -> argparse.ArgumentParser:
    """A script's command line, with what all have in common."""
    parser = argparse.ArgumentParser(prog=f"python -m examples.{module}", description=description)
    parser.add_argument("--base", type=Path, help="checkpoint to start from (default: one that is trained once)")
    parser.add_argument("--seed", type=int, default=0, help="of the job's randomness")
    parser.add_argument("--picture", type=Path, help="SVG file to draw the report into")
    return parser


def connect() -> Client:
    """The client of the service, closed by `with`."""
    return Client(*resolve(os.environ.get("FORGETD_URL"), os.environ.get("FORGETD_KEY")))


def push_digits(client: Client, base: Path | None, classifier: Path | None) -> tuple[Checkpoint, Classifier]:
    """Upload the flow that draws digits, and the classifier that judges them; what is missing is trained (minutes)."""
    with tempfile.TemporaryDirectory() as folder:
        if base is None:
            digit_base()
        if classifier is None:
            classifier = Path(folder) / "digits.onnx"
            export_onnx(digit_classifier(), classifier)
        checkpoint = client.push_checkpoint(base or base_path(), name="digits")
        return checkpoint, client.push_classifier(classifier, CLASSES, name="digit")


def report_of(client: Client, job: Job) -> dict[str, Any]:
    """Wait for a job, print its verdict and its figures, and return its report.

    Raises:
        JobFailed: it came to no verdict: its inputs cannot be used, or it was cancelled.
    """
    print(f"{job.id} ...", flush=True)
    job = client.wait(job.id, raise_on_failure=False)
    if not job.succeeded and job.reason != "criteria_not_met":
        raise job_error(job)
    report = client.report(job.id)
    print(f"{report['verdict']['outcome']}: {report['verdict']['sentence']}")
    print(f"{'class':<12} {'before':>8} {'after':>8}   {'interval':<16} asked")
    for row in report.get("fractions") or report["shares"]:  # of a flow, or of a changed condition
        after = row["after"]
        interval = f"{100 * after['low']:.1f} to {100 * after['high']:.1f} %"
        shares = f"{100 * row['before']['value']:6.1f} % {100 * after['value']:6.1f} %"
        print(f"{row['label']:<12} {shares}   {interval:<16} {_asked(row)}")
    return report


def script(main: Callable[[], int]) -> int:
    """Run a script's `main`; what the service refuses is said in its words, and the command's exit code ends it."""
    try:
        return main()
    except ClientError as error:
        print(error, file=sys.stderr)
        return exit_code_of(error)


def _asked(row: dict[str, Any]) -> str:
    low, high = row["low"], row["high"]
    if low is None and high is None:
        return "-"
    if low is None or high is None:
        return f"at most {100 * high:.4g} %" if low is None else f"at least {100 * low:.4g} %"
    return f"{100 * low:.4g} to {100 * high:.4g} %"
