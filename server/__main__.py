"""`python -m server`: settings from the environment, one base model, one store, one process."""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `main`: what is imported stays, and to look through it takes 0.3 s

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from crma.core.cache import cache_home
from crma.core.errors import ConfigError, CrmaError
from crma.models.base_model import BaseModel, find_base
from crma.models.model_shape import read_shape
from crma.models.plain_tokenizer import for_another_thread
from crma.models.prompts import Format, base_format
from crma.store.opening import open_store
from crma.store.source import is_address
from server.app import create_app
from server.drain import CANCEL_SECONDS, DrainingServer
from server.engine.native.async_engine import AsyncEngine
from server.engine.native.freed_memory import return_freed_memory
from server.engine.native.kv_size import KvSize
from server.engine.native.launch import EngineConfig, start_engine
from server.http.log import configure as configure_logs
from server.listener import addresses, listen, max_connections, protocol, raise_descriptor_limit
from server.loading import answering
from server.service.access import check_access
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.service.telemetry import connect
from server.settings import Settings, drop_service_links

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger("server")


def build(settings: Settings, metrics: Metrics | None = None) -> FastAPI:
    """The app on the native engine.

    Args:
        metrics: those of its connections too; None: new ones.

    Raises:
        CrmaError: what it cannot serve, named.
    """
    metrics = metrics or _new_metrics(settings)
    if is_address(settings.store):
        log.info("looking at the adapter store %s, and copying what is new", settings.store)
    store = open_store(settings.store, settings.require_signature, settings.home)
    base = find_base(settings.model, home=settings.home)
    telemetry = None
    if settings.otlp_endpoint is not None:
        telemetry = connect(settings.otlp_endpoint, base.name)
    engine = _start_engine(settings, base)
    tokenizer = for_another_thread(engine.engine.tokenizer)
    registry = Registry(
        store=store,
        base=base,
        engine=engine,
        base_format=_base_format(tokenizer),
        metrics=metrics,
        shape=read_shape(base),
        load_backbone=settings.load_backbone,
        copy_s=settings.store_poll_s,
    )
    return create_app(Frontend(settings, engine, registry, tokenizer, metrics, telemetry))


def _new_metrics(settings: Settings) -> Metrics:
    return Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)


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
        kv_size=KvSize(settings.kv_cache_tokens, settings.kv_cache_mib),
        prefix_caching=settings.prefix_caching,
        max_loaded_adapters=settings.max_loaded_adapters,
        max_adapter_bytes=max_adapter_bytes,
        max_queue=settings.max_queue,
        target_step_s=settings.target_step_s,
        step_timeout_s=settings.step_timeout_s,
    )
    return start_engine(base, config)


def _base_format(tokenizer: PreTrainedTokenizerBase) -> Format | None:
    """The base model's chat template; None where it has none, and takes raw prompts only."""
    try:
        return base_format(tokenizer)
    except ConfigError as error:
        log.warning("only raw prompts for the base model: %s", error.message)
        return None


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
        metrics = _new_metrics(settings)
        log.info("loading %s; /readyz says when it can serve", settings.model)
        with answering(sockets, protocol(settings, most, metrics)):
            app = build(settings, metrics)
    except CrmaError as error:
        sys.stderr.write(explain(error) + "\n")
        return 2
    return_freed_memory()
    gc.freeze()  # what is loaded now stays: collections need not look through it again and again
    log.info("listening on %s; /docs has documentation and examples", addresses(sockets))
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
