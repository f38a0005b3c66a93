"""The application: routes, middleware and error handlers, and what runs at its start and end."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

from crma.models.loading import compute_alone
from server import __version__
from server.http import error_handlers
from server.http.body_limit import BodyLimit
from server.http.log import RequestLog
from server.http.routes import (
    ablation,
    adapters,
    generate,
    models,
    openai,
    operations,
    publishing,
    responses,
    tokens,
)
from server.service.ablation import Ablations
from server.service.frontend import Frontend

log = logging.getLogger("server")

ROUTERS = (
    generate.router,
    openai.router,
    responses.router,
    models.router,
    tokens.router,
    ablation.router,
    ablation.admin,
    adapters.router,
    adapters.admin,
    publishing.admin,
    publishing.openai_admin,
    operations.router,
)
DESCRIPTION = (
    "Many fine-tuned tasks from one base model, with a shared CRMA backbone on or off per request."
)


def create_app(frontend: Frontend) -> FastAPI:
    """The application on a running engine, which it closes when it stops."""

    ablations = Ablations(frontend)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # One CPU thread each: only the engine's thread may have more (native/model_runner.py).
        workers = ThreadPoolExecutor(8, "worker", compute_alone)
        asyncio.get_running_loop().set_default_executor(workers)
        await ablations.start()
        app.state.starting = asyncio.create_task(_start(frontend))
        yield
        frontend.draining = True
        app.state.starting.cancel()
        await asyncio.gather(app.state.starting, return_exceptions=True)
        await frontend.registry.stop()
        await ablations.stop()
        await frontend.engine.close()  # uvicorn has given running requests their time by now
        frontend.close()

    app = FastAPIOffline(
        title="CRMA Server",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        strict_content_type=False,
    )
    app.state.frontend = frontend
    app.state.ablations = ablations
    settings = frontend.settings
    metrics = frontend.metrics
    metrics.watch(frontend.engine.stats, frontend.registry.names, settings.max_loaded_adapters)
    error_handlers.install(app)
    for router in ROUTERS:
        app.include_router(router)
    uploads = {publishing.UPLOAD_PATH: settings.max_upload_mib * 2**20}
    texts = {ablation.UPLOADS: settings.max_question_set_mib * 2**20}
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, uploads=uploads, texts=texts)
    app.add_middleware(RequestLog, metrics=metrics)
    _allow_origins(app, settings.cors_origins)  # the last added is the outermost: errors too
    return app


def _allow_origins(app: FastAPI, origins: Sequence[str]) -> None:
    """Let web pages of these origins call the server; without any, browsers refuse them.

    A browser asks before it sends a request, and without a key. Keys travel in a header of the
    page's own, never in cookies.
    """
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "PUT", "DELETE"),
            allow_headers=("*",),
            expose_headers=("X-Request-Id", "Retry-After"),
        )


async def _start(frontend: Frontend) -> None:
    """Verify the store and run a first step; until then /readyz says what is missing."""
    try:
        await frontend.registry.start()
        await frontend.engine.warm_up()
    except Exception:
        log.exception("the server cannot start, and ends")
        frontend.engine.on_failure()
    else:
        tasks = sorted(frontend.registry.names().values())
        log.info("ready: %s, tasks: %s", frontend.model.name, tasks)
