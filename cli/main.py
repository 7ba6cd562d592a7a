"""The ``forgetd`` command: parse, call the client, print."""

from __future__ import annotations

import os
import sys

import typer

from cli import checkpoints, classifiers, doctor, images, jobs, keys, local, tenants, train, worker
from cli.exits import ExitCode, exit_code_of
from cli.options import prose

__all__ = ["app", "main"]

HELP = """Make trained generative models forget, with evidence that an auditor can check.

Try it: `forgetd demo` trains a small model of faces, makes it forget one person, and shows the evidence.

Use it: `forgetd up` runs the service on this machine; the commands below then find it by themselves.
"""

EXITS = """Exit codes: 0 done; 1 this machine would not; 2 wrong usage; 3 the service refused; 4 no answer, or one that
asks to try again; 5 the job failed or was cancelled; 6 the job missed its criteria; 7 --timeout passed;
130 interrupted. Results go to stdout, all else to stderr."""

app = typer.Typer(
    name="forgetd",
    help=prose(HELP),
    epilog=prose(EXITS),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
local.register(app)
train.register(app)
doctor.register(app)
worker.register(app)
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(classifiers.app, name="classifiers")
app.add_typer(images.app, name="images")
app.add_typer(jobs.app, name="jobs")
app.add_typer(keys.app, name="keys")
app.add_typer(tenants.app, name="tenants")


def main() -> None:
    """Run the command; every expected error becomes a few lines on stderr and an exit code."""
    try:
        app(prog_name="forgetd")
    except BrokenPipeError:
        # The reader of our output has gone: nothing to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.FAILURE)
    except OSError as error:
        from cli.output import say

        say(f"Error: {error}")
        sys.exit(ExitCode.FAILURE)
    except Exception as error:
        from cli.errors import ClientError

        if not isinstance(error, ClientError):
            raise
        from cli.output import report_error

        report_error(error)
        sys.exit(exit_code_of(error))


if __name__ == "__main__":
    main()
