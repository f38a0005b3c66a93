"""`python -m server`: settings from the environment, one base model, one store, one process."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `main`: what is imported stays, and to look through it takes 0.3 s

import argparse
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from crma.core.cache import cache_home
from crma.core.errors import CrmaError
from crma.models.base_model import BaseModel, find_base
from crma.models.model_shape import read_shape
from crma.models.plain_tokenizer import for_another_thread
from crma.models.prompts import BASE_TEMPLATE, Format
from crma.models.serving_record import Served, read_served, serving_tokenizer
from crma.store.opening import open_store
from crma.store.source import is_address
from server.app import check_tracing, create_app
from server.drain import CANCEL_SECONDS, DrainingServer
from server.engine.inference_engine import InferenceEngine
from server.engine.native.freed_memory import return_freed_memory
from server.engine.native.kv_size import KvSize
from server.engine.native.launch import EngineConfig, start_engine
from server.engine.vllm import launch as vllm_launch
from server.http.log import configure as configure_logs
from server.listener import addresses, listen, max_connections, protocol, raise_descriptor_limit
from server.loading import answering
from server.service.access import check_access
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.service.telemetry import connect
from server.settings import Settings, drop_service_links, set_defaults

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    EngineOn = Callable[[Settings, BaseModel, PreTrainedTokenizerBase], InferenceEngine]

log = logging.getLogger("server")


def new_engine(
    settings: Settings, base: BaseModel, tokenizer: PreTrainedTokenizerBase
) -> InferenceEngine:
    """The engine that the settings name, in this process; it runs.

    Args:
        tokenizer: of the base model, for the engine alone.

    Raises:
        CrmaError: what it cannot serve, named.
    """
    settings.check_engine()
    if settings.engine == "vllm":
        return _start_vllm(settings, base)
    return start_engine(base, _engine_config(settings), tokenizer)


def build(
    settings: Settings,
    metrics: Metrics | None = None,
    engine_on: EngineOn = new_engine,
) -> FastAPI:
    """The app on an engine.

    Args:
        metrics: those of its connections too; None: new ones.
        engine_on: makes the engine.

    Raises:
        CrmaError: what it cannot serve, named.
    """
    metrics = metrics or new_metrics(settings)
    if is_address(settings.store):
        log.info("looking at the adapter store %s, and copying what is new", settings.store)
    store = open_store(settings.store, settings.require_signature, settings.home)
    base = find_base(settings.model, home=settings.home)
    telemetry = None
    if settings.otlp_endpoint is not None:
        check_tracing()
        telemetry = connect(settings.otlp_endpoint, base.name)
    served = read_served(base)
    tokenizer = serving_tokenizer(base, served)
    engine = engine_on(settings, base, for_another_thread(tokenizer))
    registry = Registry(
        store=store,
        base=base,
        engine=engine,
        base_format=_base_format(served),
        metrics=metrics,
        shape=read_shape(base),
        load_backbone=settings.load_backbone,
        copy_s=settings.store_poll_s,
    )
    return create_app(Frontend(settings, engine, registry, tokenizer, metrics, telemetry))


def new_metrics(settings: Settings) -> Metrics:
    """Metrics of a server, in a registry of their own."""
    return Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)


def _engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kernel=settings.kernel,
        kernel_folder=(settings.home or cache_home()) / "kernels",
        num_threads=settings.num_threads,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_size=KvSize(settings.kv_cache_tokens, settings.kv_cache_mib),
        prefix_caching=settings.prefix_caching,
        max_loaded_adapters=settings.max_loaded_adapters,
        max_adapter_bytes=_max_adapter_bytes(settings),
        max_queue=settings.max_queue,
        target_step_s=settings.target_step_s,
        step_timeout_s=settings.step_timeout_s,
    )


def _start_vllm(settings: Settings, base: BaseModel) -> InferenceEngine:
    config = vllm_launch.EngineConfig(
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.vllm_quantization,
        num_threads=settings.num_threads,
        tensor_parallel_size=settings.tensor_parallel_size,
        pipeline_parallel_size=settings.pipeline_parallel_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_model_len=settings.max_model_len,
        kv_size=KvSize(settings.kv_cache_tokens, settings.kv_cache_mib),
        memory_share=settings.memory_share,
        prefix_caching=settings.prefix_caching,
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        max_loaded_adapters=settings.max_loaded_adapters,
        max_adapter_bytes=_max_adapter_bytes(settings),
        max_queue=settings.max_queue,
    )
    set_defaults(vllm_launch.environment(config))
    return vllm_launch.start_engine(base, config)


def _max_adapter_bytes(settings: Settings) -> int | None:
    return None if settings.max_adapter_mib is None else settings.max_adapter_mib * 2**20


def _base_format(served: Served) -> Format | None:
    """The base model's chat template; None where it has none, and takes raw prompts only."""
    if served.chat_problem is not None:
        log.warning("only raw prompts for the base model: %s", served.chat_problem)
        return None
    return BASE_TEMPLATE


def explain(error: CrmaError) -> str:
    """What stopped the start, in a line: the variable if it is a setting, and what is allowed."""
    variable = f"CRMA_{error.field.upper()}: " if error.field in Settings.model_fields else ""
    allowed = f" (allowed: {error.allowed})" if error.allowed else ""
    return f"{variable}{error.message}{allowed}"


def _options(arguments: Sequence[str]) -> dict[str, Any]:
    """Settings from the command line. Ends the process for one that does not exist."""
    parser = argparse.ArgumentParser(prog="python -m server", description=__doc__)
    for name in ("store", "model", "host", "port", "device"):
        parser.add_argument(f"--{name}", help=f"as CRMA_{name.upper()}")
    parser.add_argument(
        "--allow-open", action="store_true", help="as CRMA_ALLOW_OPEN=true: serve without keys"
    )
    parser.add_argument(
        "--json",
        dest="log_format",
        action="store_const",
        const="json",
        help="as CRMA_LOG_FORMAT=json",
    )
    parser.add_argument("--quiet", action="store_true", help="log warnings and errors only")
    given = vars(parser.parse_args(arguments))
    return {name: value for name, value in given.items() if value}


def main(arguments: Sequence[str] = ()) -> int:
    """Serve until told to stop.

    The exit code is 2 for a setting, model or port that cannot be used, and 1 if the engine has
    failed. The ports are bound before anything is read or written.
    """
    gc.enable()
    options = _options(arguments)
    if options.pop("quiet", False):
        logging.disable(logging.INFO)
    links = drop_service_links()
    with ExitStack() as ports:
        return _serve(options, links, ports)


def _serve(options: Mapping[str, Any], links: Sequence[str], ports: ExitStack) -> int:
    """As `main`; `ports` closes what was bound."""
    try:
        settings = Settings.load(**options)
        configure_logs(settings.log_format)
        if links:
            log.warning("ignored, because Kubernetes set it for a Service: %s", ", ".join(links))
        check_access(settings)
        most = max_connections(settings, raise_descriptor_limit())
        sockets = [ports.enter_context(each) for each in listen(settings)]
        metrics = new_metrics(settings)
        log.info("loading %s; /readyz says when it can serve", settings.model)
        with answering(sockets, protocol(settings, most, metrics)):
            app = build(settings, metrics)
    except CrmaError as error:
        sys.stderr.write(explain(error) + "\n")
        return 2
    return_freed_memory()
    gc.freeze()  # what is loaded now stays: collections need not look through it again and again
    log.info("listening on %s; /docs has documentation and examples", addresses(sockets))
    if settings.page:
        log.info("open the same address in a browser to ask, compare and watch")
    config = uvicorn.Config(
        app,
        http=protocol(settings, most, metrics),
        ws="none",
        lifespan="on",  # an app that cannot start ends the server; by default uvicorn would go on
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=CANCEL_SECONDS,
    )
    server = DrainingServer(config, app.state.frontend)
    app.state.frontend.engine.on_failure = server.fail
    server.on_drained = server.end_process_in_time
    server.run(sockets)
    return server.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
