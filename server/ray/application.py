"""The application that Ray Serve runs: the ingress, and the replicas behind it.

`serve run server.ray.application:build` and the import path of a RayService name `build`.
"""

import asyncio
import gc
import logging
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from crma.core.errors import BaseMismatch, CrmaError, StoreError
from crma.models.base_model import BaseModel, find_base
from crma.models.serving_record import serving_tokenizer
from server.daemon_threads import DaemonThreads
from server.engine.inference_engine import InferenceEngine
from server.engine.native.freed_memory import return_freed_memory
from server.engines import new_engine
from server.http.log import configure as configure_logs
from server.listener import DEFAULT_CONNECTIONS
from server.ray.config import ReplicasConfig
from server.ray.engine_replica import EngineReplica
from server.ray.remote_engine import RemoteEngine
from server.ray.replica_metrics import ReplicaMetrics
from server.ray.router import AdapterRouter
from server.ray.serve_replicas import ServeReplicas
from server.service.access import check_access
from server.settings import Settings
from server.startup import build as build_app
from server.startup import new_metrics

if TYPE_CHECKING:
    from crma.method.backbone import Backbone
    from crma.method.lora import Lora

log = logging.getLogger("server")

EVERYWHERE = "0.0.0.0"  # where Serve's proxies listen, for all that the app can know
INGRESS = "ingress"
ENGINE = "engine"
ROUTING_SECONDS = 1.0  # between two reports of what a replica has in memory
HEALTH_SECONDS = 2.0
HEALTH_TIMEOUT_SECONDS = 30.0
FETCH_SECONDS = 60.0  # for an adapter to come from the ingress
QUIET = LoggingConfig(enable_access_log=False, log_level="WARNING")  # the server has its own
MAX_STARTS = 3  # of a replica that cannot start, before Serve gives up
RESERVED_CALLS = 16  # of a replica, beside requests


class ServedReplica(EngineReplica):
    """An `EngineReplica` in a process of Serve's."""

    def __init__(self, config: ReplicasConfig) -> None:
        settings = config.server_settings()
        configure_logs(settings.log_format)
        base = find_base(settings.model, home=settings.home)
        context = serve.get_replica_context()
        self._ingress = serve.get_deployment_handle(INGRESS, context.app_name)
        engine = new_engine(settings, base, serving_tokenizer(base))
        engine.on_failure = _end
        return_freed_memory()
        gc.freeze()  # as server.__main__
        super().__init__(context.replica_id.unique_id, engine, self._adapter)

    async def check_health(self) -> None:
        """Run the first step, before Serve sends the first request. Raises EngineStopped."""
        _, error = await self.warm_up()
        if error is not None:
            raise error

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router should know."""
        return {"resident": list(self.engine.resident())}

    def _adapter(self, digest: str) -> "Lora | Backbone":
        """An adapter from the ingress. Raises StoreError: it cannot load it, or is away."""
        try:
            found = self._ingress.adapter.remote(digest).result(timeout_s=FETCH_SECONDS)
        except (RayError, RayServeException, TimeoutError) as error:
            message = "the ingress did not give this adapter to the replica; try again"
            raise StoreError(message, field="digest", value=digest) from error
        if isinstance(found, CrmaError):
            raise found
        return found


def _end() -> None:
    """End the process of an engine that has failed: Serve starts another, and requests go there."""
    log.error("the engine has failed, and its replica ends")
    os._exit(1)


class Ingress:
    """The app: Serve's proxies send it every HTTP request."""

    async def __init__(  # type: ignore[misc]  # Serve waits for it
        self, config: ReplicasConfig, engines: DeploymentHandle
    ) -> None:
        settings = config.server_settings()
        configure_logs(settings.log_format)
        check_access(settings.model_copy(update={"host": EVERYWHERE}))
        replicas = ServeReplicas(engines)
        model = await replicas.model()
        self._engine = RemoteEngine(
            replicas, model, max_running=settings.max_num_seqs, max_queue=settings.max_queue
        )
        self._threads = DaemonThreads()  # that read the store, which may not answer
        self._has_failed = False
        self._engine.on_failure = self._fail
        metrics = new_metrics(settings)
        metrics.registry.register(ReplicaMetrics(self._engine))
        self._app = await asyncio.to_thread(build_app, settings, metrics, self._engine_on)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The app, for Serve."""
        self._app.add_middleware(WithoutRequestId)
        return self._app

    async def check_health(self) -> None:
        """Raises RuntimeError if the app could not start."""
        if self._has_failed:
            raise RuntimeError("the server cannot start; its log has the reason")

    async def adapter(self, digest: str) -> "Lora | Backbone | CrmaError":
        """An adapter, for a replica that loads it; or why it cannot be loaded."""
        try:
            return await self._threads.run(partial(self._engine.adapter, digest))
        except CrmaError as error:
            return error

    def _fail(self) -> None:
        self._has_failed = True

    def _engine_on(self, _: Settings, base: BaseModel, __: object) -> InferenceEngine:
        """The remote engine. Raises BaseMismatch if the replicas have another base model."""
        served = self._engine.model
        if served.digest != base.digest:
            message = f"the replicas serve another {served.name} than the ingress has"
            raise BaseMismatch(message, field="model", value=served.digest, allowed=base.digest)
        return self._engine


class WithoutRequestId:
    """ASGI middleware: Serve's proxy adds the X-Request-Id that the app has from it once more."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["X-Request-Id"]
            await send(message)

        await self.app(scope, receive, send_without)


def build(args: ReplicasConfig) -> Application:
    """The application that a configuration describes."""
    settings = args.server_settings()
    engines = serve.deployment(
        ServedReplica,
        name=ENGINE,
        num_replicas=None if args.autoscaling else args.replicas,
        autoscaling_config=_autoscaling(args),
        ray_actor_options={
            "num_cpus": args.num_cpus,
            "num_gpus": args.num_gpus,
            "runtime_env": {"env_vars": args.environment(settings)},
        },
        max_ongoing_requests=settings.max_num_seqs + settings.max_queue + RESERVED_CALLS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        logging_config=QUIET,
        max_constructor_retry_count=MAX_STARTS,
        request_router_config=RequestRouterConfig(
            request_router_class=AdapterRouter,
            request_router_kwargs={"affinity": args.affinity, "max_lead": args.max_lead},
            request_routing_stats_period_s=ROUTING_SECONDS,
        ),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=1,
        ray_actor_options={"num_cpus": args.ingress_cpus, "resources": args.ingress_resources},
        max_ongoing_requests=settings.max_connections or DEFAULT_CONNECTIONS,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
        health_check_timeout_s=HEALTH_TIMEOUT_SECONDS,
        logging_config=QUIET,
        max_constructor_retry_count=MAX_STARTS,
    )
    return ingress.bind(args, engines.bind(args))


def _autoscaling(config: ReplicasConfig) -> AutoscalingConfig | None:
    given = config.autoscaling
    if given is None:
        return None
    return AutoscalingConfig(
        min_replicas=given.min_replicas,
        max_replicas=given.max_replicas,
        target_ongoing_requests=given.target_requests,
        upscale_delay_s=given.upscale_delay_s,
        downscale_delay_s=given.downscale_delay_s,
    )
