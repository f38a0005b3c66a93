"""Puts the parts together: routes, middleware, errors, and what happens at the start and the end."""

import asyncio
import codecs
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crma.models.loading import compute_alone
from server import __version__
from server.http import error_handlers
from server.http.log import RequestLog
from server.http.routes import ablation, adapters, generate, openai, operations
from server.service import errors
from server.service.ablation import Ablations
from server.service.frontend import Frontend

log = logging.getLogger("server")


def create_app(frontend: Frontend, on_stop: Callable[[], Awaitable[None]]) -> FastAPI:
    """The application; `on_stop` is awaited when no request runs any more: it ends the engine."""

    ablations = Ablations(frontend)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # One CPU thread each: only the engine's may have more (server/engine/model_runner.py).
        workers = ThreadPoolExecutor(8, "worker", compute_alone)
        asyncio.get_running_loop().set_default_executor(workers)
        await asyncio.to_thread(ablations.load)
        app.state.starting = asyncio.create_task(_start(frontend))
        yield
        frontend.draining = True
        app.state.starting.cancel()
        await asyncio.gather(app.state.starting, return_exceptions=True)
        await frontend.registry.stop()
        await ablations.stop()
        await on_stop()
        frontend.close()

    app = FastAPIOffline(
        title="CRMA Server",
        version=__version__,
        description="Many fine-tuned tasks from one base model, with a shared CRMA backbone on or off per request.",
        lifespan=lifespan,
        redoc_url=None,
        strict_content_type=False,
    )
    app.state.frontend = frontend
    app.state.ablations = ablations
    settings, metrics = frontend.settings, frontend.metrics
    metrics.watch(frontend.engine.stats, frontend.registry.names, settings.max_loaded_adapters)
    error_handlers.install(app)
    for router in (
        generate.router,
        openai.router,
        ablation.router,
        adapters.router,
        adapters.admin,
        operations.router,
    ):
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
        log.exception("the server cannot start, and ends")
        frontend.engine.on_failure()
    else:
        log.info(
            "ready: %s, tasks: %s", frontend.model.name, sorted(frontend.registry.names().values())
        )


@dataclass
class BodyLimit:
    """ASGI middleware: a body that is over `max_bytes` or not UTF-8 fails while it is read, and is not read on."""

    app: ASGIApp
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size, decoder = 0, codecs.getincrementaldecoder("utf-8")()

        async def checked() -> Message:
            nonlocal size
            message = await receive()
            if message["type"] == "http.request":
                size += len(message.get("body", b""))
                if size > self.max_bytes:
                    limit = f"<= {self.max_bytes} bytes"
                    raise errors.BodyTooLarge(
                        "the body is over the limit", field="body", value=size, allowed=limit
                    )
                decoder.decode(message.get("body", b""), final=not message.get("more_body", False))
            return message

        await self.app(scope, checked, send)
