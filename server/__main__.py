"""`python -m server`: settings from the environment, one base model, one store, one process."""

import logging
import math
import os
import signal
import sys
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from transformers import PreTrainedTokenizerBase

from crma.core.cache import cache_home
from crma.core.errors import ConfigError, CrmaError
from crma.models.base_model import BaseModel, find_base
from crma.models.loading import load_tokenizer
from crma.models.model_shape import read_shape
from crma.models.prompts import Format, base_format
from crma.store.opening import open_store
from server.app import create_app
from server.engine.native.async_engine import AsyncEngine
from server.engine.native.launch import EngineConfig, start_engine
from server.http.log import configure as configure_logs
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.settings import Settings, drop_service_links

log = logging.getLogger("server")


def build(settings: Settings) -> FastAPI:
    """The app on the native engine. Raises CrmaError for what it cannot serve, named."""
    store = open_store(settings.store, settings.require_signature)
    base = find_base(settings.model, home=settings.home)
    engine = _start_engine(settings, base)
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)
    tokenizer = load_tokenizer(base)  # not the engine's: two threads must not share one
    registry = Registry(
        store=store,
        base=base,
        engine=engine,
        base_format=_base_format(tokenizer),
        metrics=metrics,
        shape=read_shape(base),
        load_backbone=settings.load_backbone,
    )
    return create_app(Frontend(settings, engine, registry, tokenizer, metrics))


def _start_engine(settings: Settings, base: BaseModel) -> AsyncEngine:
    max_adapter_bytes = None
    if settings.max_adapter_mib is not None:
        max_adapter_bytes = settings.max_adapter_mib * 2**20
    config = EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kernel=settings.kernel,
        kernel_folder=(settings.home or cache_home()) / "kernels",
        num_threads=settings.num_threads,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_cache_tokens=settings.kv_cache_tokens,
        prefix_caching=settings.prefix_caching,
        max_loaded_adapters=settings.max_loaded_adapters,
        max_adapter_bytes=max_adapter_bytes,
        max_queue=settings.max_queue,
    )
    return start_engine(base, config)


def _base_format(tokenizer: PreTrainedTokenizerBase) -> Format | None:
    """The base model's chat template; None where it has none, and takes raw prompts only."""
    try:
        return base_format(tokenizer)
    except ConfigError as error:
        log.warning("only raw prompts for the base model: %s", error.message)
        return None


class _Server(uvicorn.Server):
    """SIGTERM or SIGINT: no new requests from then on; running ones have `drain_timeout_s`."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start draining. A second SIGINT ends the server at once."""
        assert isinstance(self.config.app, FastAPI)
        self.config.app.state.frontend.draining = True
        log.info("%s: draining", signal.Signals(sig).name)
        super().handle_exit(sig, frame)


def explain(error: CrmaError) -> str:
    """What stopped the start, in a line: the variable if it is a setting, and what is allowed."""
    variable = f"CRMA_{error.field.upper()}: " if error.field in Settings.model_fields else ""
    allowed = f" (allowed: {error.allowed})" if error.allowed else ""
    return f"{variable}{error.message}{allowed}"


def main() -> int:
    """Serve until told to stop. The exit code is 2 for a setting or model that cannot be used."""
    links = drop_service_links()
    try:
        settings = Settings.load()
        configure_logs(settings.log_format)
        if links:
            log.warning("ignored, because Kubernetes set it for a Service: %s", ", ".join(links))
        app = build(settings)
    except CrmaError as error:
        sys.stderr.write(explain(error) + "\n")
        return 2
    # A server whose engine has failed ends, so that its supervisor starts another.
    app.state.frontend.engine.on_failure = partial(os.kill, os.getpid(), signal.SIGTERM)
    log.info("documentation and examples: http://%s:%s/docs", settings.host, settings.port)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_s),
    )
    _Server(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
