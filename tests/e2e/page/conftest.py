"""Debian's Chromium on the page of a real server, with the real model.

`make e2e` installs playwright; without it these tests are left out, and without Chromium
(`apt-get install chromium`) they are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from paths import STORE
from server_process import running_server

if TYPE_CHECKING:
    from page_visit import Visit
    from playwright.sync_api import Browser

if find_spec("playwright") is None:
    collect_ignore_glob = ["test_*.py"]

ADMIN_KEY = "the admin key"
API_KEY = "an API key"


@pytest.fixture(scope="session")
def admin_key() -> str:
    """Of `server`."""
    return ADMIN_KEY


@pytest.fixture(scope="session")
def api_key() -> str:
    """Of `keyed_server`."""
    return API_KEY


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for a module of tests; while it runs, no loop of asyncio's can."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server without keys but for an admin key, on a copy of the shipped store."""
    evaluations = str(tmp_path_factory.mktemp("evaluations"))
    store = tmp_path_factory.mktemp("store") / "store"
    shutil.copytree(STORE, store)
    with running_server(
        CRMA_EVALUATIONS=evaluations, CRMA_ADMIN_KEY=ADMIN_KEY, CRMA_STORE=str(store)
    ) as url:
        yield url


@pytest.fixture(scope="session")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server that asks for a key."""
    evaluations = str(tmp_path_factory.mktemp("evaluations"))
    with running_server(CRMA_EVALUATIONS=evaluations, CRMA_API_KEYS=API_KEY) as url:
        yield url


@pytest.fixture
def api(server: str) -> Iterator[httpx.Client]:
    """What the page's numbers are compared with."""
    with httpx.Client(base_url=server, timeout=120) as client:
        yield client


@pytest.fixture
def visit(browser: Browser, pytestconfig: pytest.Config) -> Iterator[Callable[..., Visit]]:
    """Opens a page; at the end of the test, nothing it logged may be an error."""
    from page_visit import Visit

    visits: list[Visit] = []
    folder = pytestconfig.getoption("--screenshots", None)

    def open_page(url: str, look: str = "light") -> Visit:
        opened = Visit.of(browser, url, look)
        opened.screenshots = None if folder is None else Path(folder)
        visits.append(opened)
        return opened

    yield open_page
    for each in visits:
        each.close()
