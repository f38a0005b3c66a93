"""`python -m server`: settings from the environment, one base model, one store, one process."""

import logging
import math
import os
import signal
import sys
from functools import partial
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel

from crma.core.cache import cache_home
from crma.core.errors import ConfigError, CrmaError
from crma.method.injection import Injection
from crma.models.base_model import BaseModel, find_base
from crma.models.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from crma.models.model_shape import ModelShape
from crma.models.prompts import PromptFormat, chat_format
from crma.store.adapter_store import AdapterStore
from server.app import create_app
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.async_engine import AsyncEngine
from server.engine.native.block_pool import BlockPool, root_key
from server.engine.native.engine import Engine, model_stop_ids
from server.engine.native.kernel import Kernel
from server.engine.native.model_runner import ModelRunner
from server.engine.native.scheduler import Scheduler
from server.http import log as logs
from server.http.schemas import ServedModel
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.settings import Settings

log = logging.getLogger("server")

BLOCK_SIZE = 16  # tokens: the grain in which KV memory is given out and prefixes are shared


def build_engine(settings: Settings, base: BaseModel) -> AsyncEngine:
    """Loads the model and starts the engine's thread. Raises CrmaError for what cannot be served as asked."""
    num_threads = settings.num_threads or torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # of this thread; the engine's has them (server/engine/model_runner.py)
    device = resolve_device(settings.device)
    injection = Injection(load_model(base, device, resolve_dtype(settings.dtype, device)))
    mib = settings.max_adapter_mib
    pool = AdapterPool(
        injection, settings.max_loaded_adapters, None if mib is None else mib * 2**20
    )
    tokenizer = load_tokenizer(base)
    max_model_len = min(settings.max_model_len, injection.model.config.max_position_embeddings)
    if (
        settings.max_num_batched_tokens < settings.max_num_seqs
        or settings.kv_cache_tokens < max_model_len
    ):
        pair = f"{settings.max_num_batched_tokens}, {settings.kv_cache_tokens}"
        message = "CRMA_MAX_NUM_BATCHED_TOKENS or CRMA_KV_CACHE_TOKENS is too small for what they have to hold"
        limits = (
            f"max_num_batched_tokens >= {settings.max_num_seqs}, kv_cache_tokens >= {max_model_len}"
        )
        raise ConfigError(message, field="CRMA_KV_CACHE_TOKENS", value=pair, allowed=limits)
    blocks = BlockPool(1 + -(-settings.kv_cache_tokens // BLOCK_SIZE), BLOCK_SIZE)
    identity = (base.digest, _dtype(settings, injection.model))
    root_of = (
        (lambda selection: root_key(*identity, *selection)) if settings.prefix_caching else None
    )
    kernel, int8 = _kernel(settings, injection.model), settings.quantization == "int8"
    runner = ModelRunner(
        injection, pool, blocks, num_threads, take_weights=True, kernel=kernel, int8=int8
    )
    scheduler = Scheduler(blocks, settings.max_num_seqs, settings.max_num_batched_tokens, root_of)
    stop_ids = model_stop_ids(tokenizer, injection.model.generation_config.eos_token_id)
    return AsyncEngine(
        Engine(runner, scheduler, tokenizer, stop_ids, max_model_len), pool, settings.max_queue
    )


def _dtype(settings: Settings, model: PreTrainedModel) -> str:
    """ "bfloat16", or "bfloat16+int8" where the weights are: other numbers, so another identity of what is cached."""
    quantization = "" if settings.quantization == "none" else f"+{settings.quantization}"
    return f"{str(model.dtype).removeprefix('torch.')}{quantization}"


def _kernel(settings: Settings, model: PreTrainedModel) -> Kernel | None:
    if settings.kernel == "off":
        return None
    try:
        if model.device.type != "cpu":
            raise ConfigError(
                "the kernel is for CPUs", field="CRMA_KERNEL", value="on", allowed="CRMA_DEVICE=cpu"
            )
        return Kernel(model.dtype, (settings.home or cache_home()) / "kernels")
    except ConfigError as error:
        if settings.kernel == "on":
            raise
        log.info("no native kernel: %s", error.message)
        return None


def build(settings: Settings) -> FastAPI:
    """The app on a real engine."""
    base = find_base(settings.model, home=settings.home)
    engine = build_engine(settings, base)
    injection = engine.pool.injection
    metrics = Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)
    tokenizer = load_tokenizer(base)  # not the engine's: two threads must not share one
    base_format: PromptFormat | None = None
    try:
        base_format = chat_format(tokenizer)
    except ConfigError as error:
        log.warning("only raw prompts for the base model: %s", error.message)
    store = AdapterStore(settings.store)
    shape = ModelShape.of(injection.model)
    registry = Registry(
        store, base, engine.pool, base_format, metrics, shape, settings.load_backbone
    )
    dtype, limit = _dtype(settings, injection.model), engine.engine.max_model_len
    model = ServedModel(name=base.name, digest=base.digest, dtype=dtype, max_model_len=limit)
    frontend = Frontend(settings, engine, registry, tokenizer, model, metrics)
    return create_app(
        frontend, on_stop=engine.stop
    )  # uvicorn has given requests their time by then


class _Server(uvicorn.Server):
    """SIGTERM or SIGINT: not ready and no new requests from that moment; running ones have `drain_timeout_s`."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Also called a second time by an impatient SIGINT, which ends at once."""
        assert isinstance(self.config.app, FastAPI)
        self.config.app.state.frontend.draining = True
        log.info("%s: draining", signal.Signals(sig).name)
        super().handle_exit(sig, frame)


def main() -> int:
    """Serves until it is told to stop. The exit code is 2 for a setting or model that cannot be used."""
    try:
        settings = Settings.load()
        logs.configure(settings.log_format)
        app = build(settings)
    except CrmaError as error:
        allowed = f" (allowed: {error.allowed})" if error.allowed else ""
        sys.stderr.write(f"{error.message}{allowed}\n")
        return 2
    # A server whose engine is gone ends, so that whoever supervises it starts another.
    app.state.frontend.engine.on_failure = partial(os.kill, os.getpid(), signal.SIGTERM)
    log.info("documentation and examples: http://%s:%s/docs", settings.host, settings.port)
    config = uvicorn.Config(app, settings.host, settings.port, log_config=None, access_log=False)
    config.timeout_graceful_shutdown = math.ceil(settings.drain_timeout_s)
    _Server(config).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
