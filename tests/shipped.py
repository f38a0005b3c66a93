"""The server on the shipped store and the real base model, for the long tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from paths import STORE

from server.__main__ import build
from server.settings import Settings


@asynccontextmanager
async def server(**settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """The app as `python -m server` builds it, ready."""
    app = build(Settings(store=STORE, **settings))
    async with app.router.lifespan_context(app):
        await app.state.starting
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test", timeout=300
        ) as client:
            yield client
