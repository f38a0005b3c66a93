"""The real app over ASGI on a scripted engine: what the tests of the routes share."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from scripted_engine import TINY, ScriptedEngine

from crma.models.base_model import BaseModel

JSON = {"content-type": "application/json"}
SCOPE = {"type": "http", "method": "POST", "path": "/generate", "query_string": b"", "headers": []}
BASE = BaseModel(TINY.name, TINY.digest, Path("nowhere"), {})


@dataclass
class Served:
    """One running app and what stands around it."""

    app: FastAPI
    client: httpx.AsyncClient
    engine: ScriptedEngine

    async def generate(self, **body: Any) -> httpx.Response:
        return await self.client.post("/generate", json={"prompt": "Hi", **body})

    async def error(self, **body: Any) -> tuple[int, str]:
        response = await self.generate(**body)
        return response.status_code, response.json()["error"]["code"]

    async def metrics(self) -> str:
        return (await self.client.get("/metrics")).text


async def refused(served: Served, status: int, code: str, **request: Any) -> dict[str, Any]:
    """The error of a request that must be refused, in the shape of its path; after it a good one
    must work.
    """
    path = request.pop("path", "/generate")
    response = await served.client.post(path, **{"headers": JSON, **request})
    assert response.status_code == status, response.text
    error = response.json()["error"]
    openai, ours = (
        ["message", "type", "param", "code"],
        ["code", "message", "field", "value", "allowed"],
    )
    assert (list(error), error["code"]) == (openai if path.startswith("/v1/") else ours, code)
    served.engine.refusal = None
    if status != 401:
        assert (await served.generate()).status_code == 200
    return error


Serve = Callable[..., Any]
