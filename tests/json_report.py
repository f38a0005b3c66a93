"""`--record FILE`: what each test did, and what it measured, as JSON.

The file is written after every test, so that it has those that ran where the rest is cut off.
"""

import json
from pathlib import Path
from typing import Any

import pytest


class JsonReport:
    """A pytest plugin.

    Args:
        path: of the file. It holds "tests", a list of {"test", "outcome", "seconds", "error"?} and
            of what the test recorded by `record_property`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a test that has run, was skipped, or could not be set up."""
        if report.when != "call" and report.passed:
            return
        test = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        test |= dict(report.user_properties)
        if not report.passed:
            test["error"] = str(report.longrepr)[-2000:]
        self._tests.append(test)
        self._path.write_text(json.dumps({"tests": self._tests}, indent=2) + "\n")
