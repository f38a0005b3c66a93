"""The `crma` command, run in this process."""

import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from crma.cli.command import main


def crma(*arguments: object) -> tuple[int, str, str]:
    """Runs the command. Returns its exit code, stdout and stderr."""
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["crma", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
    return int(caught.value.code or 0), out.getvalue(), err.getvalue()
