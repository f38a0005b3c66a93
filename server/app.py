"""The application: routes, middleware and error handlers, and what runs at its start and end."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from inspect import signature
from typing import Any

from fastapi import FastAPI
from fastapi import __version__ as fastapi_version
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline

from crma.core.errors import ConfigError
from crma.models.loading import compute_alone
from crma.models.plain_tokenizer import import_templates
from server import __version__
from server.engine.errors import EngineError
from server.http import error_handlers
from server.http.body_limit import BodyLimit
from server.http.cut_off import CutOff
from server.http.health_port import HealthPort
from server.http.host_check import HostCheck
from server.http.log import UNKNOWN_ROUTE, RequestLog
from server.http.routes import (
    ablation,
    adapters,
    audit,
    backbones,
    generate,
    models,
    openai,
    operations,
    page,
    publishing,
    responses,
    runs,
    tokens,
    usage,
)
from server.http.security_headers import SecurityHeaders
from server.service.ablation import Ablations
from server.service.disk_space import DiskSpace
from server.service.engine_metrics import EngineMetrics
from server.service.frontend import Frontend
from server.service.telemetry import Telemetry
from server.service.vllm_metrics import VllmMetrics

log = logging.getLogger("server")

ROUTERS = (
    generate.router,
    openai.router,
    responses.router,
    models.router,
    tokens.router,
    ablation.router,
    ablation.owned,
    adapters.router,
    adapters.admin,
    backbones.router,
    backbones.admin,
    publishing.admin,
    publishing.openai_admin,
    usage.router,
    audit.admin,
    runs.router,
    operations.router,
    operations.metrics_router,
)
ANY_ROUTE = (200, 500)  # statuses that every route can answer with
PROBES = frozenset({"/healthz", "/readyz", "/health", "/ping", "/metrics"})  # not traced
DESCRIPTION = (
    "Many fine-tuned tasks from one base model, with a shared CRMA backbone on or off per request."
)


def create_app(frontend: Frontend) -> FastAPI:
    """The application on a running engine, which it closes when it stops."""

    ablations = Ablations(frontend)
    settings = frontend.settings
    metrics = frontend.metrics
    folders = {"store": frontend.registry.store.root, "evaluations": settings.evaluations}
    disks = DiskSpace(folders, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # One CPU thread each: only the engine's thread may have more (native/model_runner.py).
        workers = ThreadPoolExecutor(8, "worker", compute_alone)
        asyncio.get_running_loop().set_default_executor(workers)
        await ablations.start()
        frontend.keys.start()
        frontend.usage.start()
        disks.start()
        app.state.starting = asyncio.create_task(_start(frontend))
        yield
        frontend.draining = True
        app.state.starting.cancel()
        await asyncio.gather(app.state.starting, return_exceptions=True)
        await frontend.promoter.stop()
        await frontend.registry.stop()
        await frontend.keys.stop()
        await ablations.stop()
        await frontend.engine.close()  # uvicorn has given running requests their time by now
        await frontend.close()
        disks.stop()
        if frontend.telemetry is not None:
            await frontend.telemetry.close()

    app = FastAPIOffline(
        telemetry=_telemetry_config(frontend.telemetry),
        title="CRMA Server",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.frontend = frontend
    app.state.ablations = ablations
    _watch_engine(frontend)
    error_handlers.install(app)
    for router in (*ROUTERS, page.router) if settings.page else ROUTERS:
        app.include_router(router)
        for route in router.routes:
            if isinstance(route, APIRoute):
                metrics.serve_route(route.path, (*ANY_ROUTE, *map(int, route.responses)))
    metrics.serve_route(UNKNOWN_ROUTE, (404, 405, 500))
    _add_middleware(app, frontend)
    return app


def _add_middleware(app: FastAPI, frontend: Frontend) -> None:
    """What every request passes. The last added is the outermost."""
    settings = frontend.settings
    uploads = {publishing.UPLOAD_PATH: settings.max_upload_mib * 2**20}
    texts = {ablation.UPLOADS: settings.max_question_set_mib * 2**20}
    app.add_middleware(
        BodyLimit,
        max_bytes=settings.max_body_bytes,
        timeout_s=settings.body_timeout_s,
        uploads=uploads,
        texts=texts,
    )
    if settings.is_open:
        names = {name.lower() for name in (settings.host, *settings.allowed_hosts)}
        app.add_middleware(HostCheck, names=names)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(CutOff, frontend=frontend)
    if settings.health_port is not None:
        app.add_middleware(HealthPort, port=settings.health_port, paths=operations.PATHS)
    app.add_middleware(RequestLog, metrics=frontend.metrics)
    _allow_origins(app, settings.cors_origins)  # errors too


def check_tracing() -> None:
    """Check that FastAPI makes a span of each request.

    Raises:
        ConfigError: it does not yet: what vLLM allows is older.
    """
    if "telemetry" not in signature(FastAPI.__init__).parameters:
        message = "traces need FastAPI 0.165 or later; the engine vllm comes with an older one"
        raise ConfigError(
            message, field="otlp_endpoint", value=fastapi_version, allowed="leave it out"
        )


def _telemetry_config(telemetry: Telemetry | None) -> dict[str, Any]:
    """What FastAPI's own telemetry does: the span and metrics of a request over HTTP, or nothing.

    It never sends logs, which have what an error said, nor looks into the environment.
    """
    config: dict[str, Any] = {"logs": False, "operation_spans": False, "auto_configure": False}
    if telemetry is None:
        return {**config, "tracing": False, "metrics": False}
    return {
        **config,
        "tracer_provider": telemetry.tracers,
        "meter_provider": telemetry.meters,
        "exclude": lambda scope: scope.get("path") in PROBES,
    }


def _watch_engine(frontend: Frontend) -> None:
    """Add the engine's metrics, and vLLM's names for them if the operator wants those."""
    metrics = frontend.metrics
    settings = frontend.settings
    stats = frontend.engine.stats
    names = frontend.registry.names
    models = frontend.registry.model_names
    watched = EngineMetrics(metrics, stats, names, models, settings.max_running_adapters)
    metrics.registry.register(watched)
    if settings.metrics_compat:
        metrics.registry.register(VllmMetrics(metrics, stats, frontend.model.name))


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
    """Verify the store and run the first steps; until then /readyz says what is missing."""
    try:
        await frontend.registry.start()
        await frontend.engine.warm_up()
    except Exception as error:
        log.exception("the server cannot start, and ends")
        known = isinstance(error, EngineError)  # others may name files
        frontend.failure = str(error) if known else "its log has the reason"
        frontend.engine.on_failure()
    else:
        frontend.is_warm = True
        tasks = sorted(frontend.registry.names().values())
        log.info("ready: %s, tasks: %s", frontend.model.name, tasks)
        # Half a second of imports, so that the first chat does not wait for all of it.
        threading.Thread(target=import_templates, daemon=True).start()
