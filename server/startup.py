"""What a server is made of at its start, whoever starts it: `server.__main__` or `server.ray`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from crma.core.errors import CrmaError
from crma.models.base_model import BaseModel, find_base
from crma.models.model_shape import read_shape
from crma.models.plain_tokenizer import for_another_thread
from crma.models.prompts import BASE_TEMPLATE, Format
from crma.models.serving_record import Served, read_served, serving_tokenizer
from crma.store.opening import open_store
from crma.store.source import is_address
from server.app import check_tracing, create_app
from server.engine.inference_engine import InferenceEngine
from server.engines import new_engine
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.service.telemetry import connect
from server.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    EngineOn = Callable[[Settings, BaseModel, PreTrainedTokenizerBase], InferenceEngine]

log = logging.getLogger("server")


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
