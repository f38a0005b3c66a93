"""The native kernel for the tests: all processes that run them share what one of them builds."""

import os
import tempfile
import threading
from pathlib import Path

import pytest

_FOLDER = "TEST_KERNELS"  # the variable that the processes of the workers inherit


def share(config: pytest.Config) -> None:
    """Make the folder, in the process that starts the others, and begin to build in it.

    The workers take longer to collect the tests. Without workers, a test that needs a kernel
    builds it.
    """
    temporary = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    config.add_cleanup(temporary.cleanup)
    os.environ[_FOLDER] = temporary.name
    if config.getoption("numprocesses", None):
        threading.Thread(target=_build_all, daemon=True).start()


def build_best() -> Path:
    """The library for the class that serves this processor by default; waits while another process
    builds it.

    Raises ConfigError without a compiler.
    """
    from server.engine.native.cpu_class import default_classes
    from server.engine.native.kernel_build import build

    return build(Path(os.environ[_FOLDER]), default_classes()[0])


def _build_all() -> None:
    from crma.core.errors import ConfigError
    from server.engine.native.cpu_class import GENERIC
    from server.engine.native.kernel_build import build

    try:
        best = build_best()
        build(best.parent, GENERIC)
    except ConfigError:  # the tests that need it say so
        return
