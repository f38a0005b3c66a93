"""A client of the app under test, and the check that a bad request is refused well."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
from fastapi import FastAPI
from scripted_engine import TINY, ScriptedEngine

from crma.models.base_model import BaseModel

JSON = {"content-type": "application/json"}
SCOPE = {
    "type": "http",
    "method": "POST",
    "path": "/generate",
    "query_string": b"",
    "headers": [(b"content-type", b"application/json")],
}
BASE = BaseModel(TINY.name, TINY.digest, Path("nowhere"), {})
OUR_FIELDS = ["code", "message", "field", "value", "allowed"]
OPENAI_FIELDS = ["message", "type", "param", "code"]


@dataclass
class Served:
    """A running app, a client that talks to it over ASGI, and its engine.

    running: ends the client and the app's lifespan.
    """

    app: FastAPI
    client: httpx.AsyncClient
    engine: ScriptedEngine
    running: AsyncExitStack

    async def stop(self) -> None:
        """Stop the app as an orderly end of the server does."""
        await self.running.aclose()

    async def generate(self, **body: Any) -> httpx.Response:
        """The answer of POST /generate."""
        return await self.client.post("/generate", json={"prompt": "Hi", **body})

    async def error(self, **body: Any) -> tuple[int, str]:
        """Status and error code of a request to /generate that fails."""
        response = await self.generate(**body)
        return response.status_code, response.json()["error"]["code"]

    async def metrics(self) -> str:
        """The text of GET /metrics."""
        return (await self.client.get("/metrics")).text


def openai_client(served: Served) -> openai.AsyncOpenAI:
    """OpenAI's own client, talking to the app over ASGI."""
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(served.app))
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="sk", max_retries=0, http_client=http
    )


async def refused(served: Served, status: int, code: str, **request: Any) -> dict[str, Any]:
    """Send a request that must be refused, then check that a good one still works.

    Args:
        request: arguments of httpx's `post`, and `path` ("/generate" by default).

    Returns:
        The error. Its fields are checked to be those of the path: OpenAI's under /v1/, else ours.
    """
    path = request.pop("path", "/generate")
    response = await served.client.post(path, **{"headers": JSON, **request})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    fields = OPENAI_FIELDS if path.startswith("/v1/") else OUR_FIELDS
    assert list(error) == fields
    assert error["code"] == code
    served.engine.refusal = None
    if status != 401:
        assert (await served.generate()).status_code == 200
    return error


Serve = Callable[..., Any]
"""Starts an app with the settings given and returns its `Served`: the fixture `serve`."""
