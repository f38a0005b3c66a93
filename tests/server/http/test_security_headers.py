"""What browsers are told about answers and pages."""

import base64
import hashlib
import re

from api import Served

PAGES = ("/docs", "/docs/oauth2-redirect")


async def test_no_answer_is_read_as_another_type(served: Served) -> None:
    for path in (*PAGES, "/healthz", "/nowhere", "/metrics", "/v1/models"):
        headers = (await served.client.get(path)).headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"


async def test_a_page_runs_its_own_scripts_only_and_cannot_be_framed(served: Served) -> None:
    for path in PAGES:
        response = await served.client.get(path)
        policy = dict(
            part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; ")
        )
        assert policy["frame-ancestors"] == "'none'"
        assert policy["default-src"] == "'none'"
        assert "unsafe-inline" not in policy["script-src"]
        scripts = re.findall(r"<script>(.*?)</script>", response.text, re.DOTALL)
        assert scripts
        for script in scripts:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy["script-src"]


async def test_everything_that_a_page_loads_is_allowed_by_its_policy(served: Served) -> None:
    """The documentation is bundled: it works without a connection to anywhere else."""
    page = (await served.client.get("/docs")).text
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert len(loaded) >= 3
    for path in loaded:
        assert path.startswith("/")
        assert (await served.client.get(path)).status_code == 200
    assert not re.findall(r"\son\w+=", page)  # no handlers in attributes, which have no hash
