"""Puts the parts together: routes, middleware, errors, and what happens at the start and the end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import __version__, errors
from server.errors import BodyTooLarge, MalformedBody, error_response
from server.frontend import Frontend
from server.log import RequestLog
from server.metrics import Metrics
from server.registry import Registry
from server.routes import ablation, adapters, generate, operations
from server.schemas import ServedModel
from server.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from server.engine.async_engine import AsyncEngine

log = logging.getLogger("server")


def create_app(
    settings: Settings,
    *,
    engine: AsyncEngine,
    registry: Registry,
    tokenizer: PreTrainedTokenizerBase,
    model: ServedModel,
    metrics: Metrics,
    on_stop: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """The application.

    Args:
        settings: limits and keys.
        engine: running already.
        registry: not started; the app starts and stops it.
        tokenizer: the app's own; not one that another thread uses.
        model: what the engine runs.
        metrics: the one that `registry` was given.
        on_stop: awaited when no request runs any more: ends the engine.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        frontend = Frontend(
            settings, engine=engine, registry=registry, tokenizer=tokenizer, model=model, metrics=metrics
        )
        app.state.frontend = frontend
        app.state.starting = asyncio.create_task(_start(frontend))
        yield
        frontend.draining = True
        app.state.starting.cancel()
        await asyncio.gather(app.state.starting, return_exceptions=True)
        await registry.stop()
        if on_stop is not None:
            await on_stop()
        frontend.close()

    app = FastAPI(
        title="CRMA Server",
        version=__version__,
        description="Many fine-tuned tasks from one base model, with a shared CRMA backbone on or off per request.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        strict_content_type=False,
    )
    app.state.settings = settings
    metrics.watch(engine.stats, registry.names, settings.max_loaded_adapters)
    errors.install(app)
    for router in (generate.router, ablation.router, adapters.router, adapters.admin, operations.router):
        app.include_router(router)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(RequestLog, metrics=metrics)  # the last added is the outermost
    return app


async def _start(frontend: Frontend) -> None:
    """Verifies the store and runs a first step; until then /readyz says what is missing."""
    try:
        await frontend.registry.start()
        await frontend.warm_up()
    except Exception:
        log.exception("the server does not become ready")
    else:
        log.info(
            "ready: %s, tasks: %s", frontend.model.name, ", ".join(sorted(frontend.registry.names().values())) or "none"
        )


class BodyLimit:
    """ASGI middleware: reads the body whole, at most `max_bytes` of it, and refuses what is not UTF-8."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except (BodyTooLarge, MalformedBody) as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if body is None:
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None if the client went away while sending it."""
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared[:20]) > self.max_bytes:
            raise self._too_large(int(declared[:20]))
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self.max_bytes:
                raise self._too_large(len(body))
            if not message.get("more_body", False):
                break
        try:
            body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise MalformedBody(
                f"the body is not UTF-8: byte {error.start}", field="body", value=body[error.start], allowed="UTF-8"
            ) from None
        return bytes(body)

    def _too_large(self, size: int) -> BodyTooLarge:
        allowed = f"<= {self.max_bytes} bytes"
        return BodyTooLarge("the body is over this server's limit", field="body", value=size, allowed=allowed)
