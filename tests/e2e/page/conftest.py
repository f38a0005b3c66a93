"""Debian's Chromium on the page of a real server, with the real model.

Without Chromium these tests are skipped: `apt-get install chromium`.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from page_visit import ADMIN_KEY, API_KEY, Visit
from paths import STORE
from playwright.sync_api import Browser, sync_playwright
from server_process import running_server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for a module of tests. It ends with it: no loop of asyncio's can run meanwhile."""
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
    visits: list[Visit] = []
    folder = pytestconfig.getoption("--screenshots")

    def open_page(url: str, **options: object) -> Visit:
        opened = Visit.of(browser, url, **options)
        opened.screenshots = None if folder is None else Path(folder)
        visits.append(opened)
        return opened

    yield open_page
    for each in visits:
        each.close()
