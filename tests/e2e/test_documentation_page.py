"""/docs in a browser, which obeys the page's content security policy.

Debian's package `chromium` has the browser.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from server_process import running_server

CHROMIUM = shutil.which("chromium")
RENDERED = 'class="opblock '  # a route, as Swagger UI shows it

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        CHROMIUM is None, reason="chromium is not installed: apt-get install chromium"
    ),
]


def opened(url: str, profile: Path) -> tuple[str, list[str]]:
    """A page once its scripts have run, and what the browser's console says."""
    assert CHROMIUM is not None
    options = ["--headless", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
    options += ["--virtual-time-budget=20000", "--enable-logging=stderr"]
    if os.geteuid() == 0:
        options.append("--no-sandbox")  # which root cannot have
    done = subprocess.run(
        [CHROMIUM, *options, url], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


def test_the_policy_lets_the_page_show_every_route(tmp_path: Path) -> None:
    with running_server(CRMA_EVALUATIONS=str(tmp_path / "kept")) as server:
        page, console = opened(f"{server}/docs", tmp_path / "profile")
    assert page.count(RENDERED) > 20
    assert console == []
