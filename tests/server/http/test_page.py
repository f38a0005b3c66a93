"""The page as a browser gets it: its files, its policy, and that it needs nothing else."""

import base64
import hashlib
import json
import re
from pathlib import Path
from posixpath import dirname, join, normpath

import pytest
from api import Serve, Served

from crma.evaluation.scorers import SCORERS
from server.http.page_files import FOLDER, read_page

IMPORT = re.compile(r"""(?:\bfrom|\bimport\()\s*"([^"]+)"|\bimport "([^"]+)";""")
OWN = sorted(path for path in FOLDER.rglob("*.js") if "vendor" not in path.parts)


def import_map(page: str) -> dict[str, str]:
    found = re.search(r'<script type="importmap">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["imports"]


async def test_the_page_may_run_its_own_modules_and_its_import_map_only(served: Served) -> None:
    response = await served.client.get("/")
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    parts = response.headers["Content-Security-Policy"].split("; ")
    policy = dict(part.split(" ", 1) for part in parts)
    text = response.text.split('<script type="importmap">')[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    assert policy["script-src"] == f"'self' 'sha256-{digest}'"
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"


async def test_everything_that_the_page_names_is_served(served: Served) -> None:
    page = (await served.client.get("/")).text
    named = [*re.findall(r'(?:src|href)="(page/[^"]+)"', page), *import_map(page).values()]
    assert len(named) > 8
    for path in named:
        response = await served.client.get(f"/{path.removeprefix('./')}")
        assert response.status_code == 200, path


async def test_every_import_of_a_module_is_a_file_of_the_page(served: Served) -> None:
    known = import_map((await served.client.get("/")).text)
    files = read_page()
    for path, file in files.items():
        if "vendor" in path or not path.endswith(".js"):
            continue
        for found in IMPORT.findall(file.content.decode()):
            name = found[0] or found[1]
            if name.startswith("."):
                assert normpath(join(dirname(path), name)) in files, (path, name)
            else:
                assert name in known, (path, name)


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.stem)
def test_a_module_asks_nobody_else_and_reads_no_text_as_html(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)
    assert not re.search(r"innerHTML|dangerouslySetInnerHTML|\beval\(|localStorage", text)


def test_the_page_says_what_each_scorer_does() -> None:
    text = (FOLDER / "ablation" / "scorer.js").read_text()
    assert re.findall(r'^  (\w+): "', text, re.MULTILINE) == list(SCORERS)


async def test_a_file_that_the_browser_has_is_not_sent_again(served: Served) -> None:
    first = await served.client.get("/page/app.js")
    assert first.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert first.headers["Cache-Control"] == "no-cache"
    tag = first.headers["ETag"]
    again = await served.client.get("/page/app.js", headers={"If-None-Match": tag})
    assert (again.status_code, again.content) == (304, b"")
    other = await served.client.get("/page/app.js", headers={"If-None-Match": '"other"'})
    assert other.content == first.content


@pytest.mark.parametrize(
    "path", ["nothing.js", "../page_files.py", "%2e%2e/page_files.py", "vendor/htm/LICENSE", ""]
)
async def test_nothing_but_files_of_the_page_is_served(served: Served, path: str) -> None:
    assert (await served.client.get(f"/page/{path}")).status_code == 404


async def test_the_page_can_be_left_out(serve: Serve) -> None:
    served = await serve(page=False)
    for path in ("/", "/page/app.js"):
        assert (await served.client.get(path)).status_code == 404


async def test_the_page_is_no_part_of_the_interface(served: Served) -> None:
    paths = (await served.client.get("/openapi.json")).json()["paths"]
    assert not [path for path in paths if path == "/" or path.startswith("/page")]
