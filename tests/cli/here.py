"""The command in this process: its words, output and exit code are those of `processes.forgetd`, without its start."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from cli.main import main
from tests.cli.processes import Result, environment

__all__ = ["forgetd_here"]


def forgetd_here(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Result:
    """Run a command to its end, from that folder and with no setting of ours but those given."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        patch.dict(os.environ, environment(env), clear=True),
        patch.object(sys, "argv", ["forgetd", *arguments]),
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return Result(code, out.getvalue(), err.getvalue())
