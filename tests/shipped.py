"""The server on the shipped store and the real base model, for the e2e tests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory

import httpx
from paths import STORE

from server.settings import Settings
from server.startup import build


@asynccontextmanager
async def server(**settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app that `python -m server` builds, once the app is ready.

    Args:
        settings: settings of the server that differ from the defaults.
    """
    with TemporaryDirectory() as kept:
        own = {"store": STORE, "allowed_hosts": "test", "evaluations": kept}
        app = build(Settings(**{**own, **settings}))
        async with app.router.lifespan_context(app):
            await app.state.starting
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://test", timeout=300
            ) as client:
                yield client
