"""The real app over ASGI, with the real store, tokenizer and pool; only the engine behind the seam is a scripted one.

For what a real engine does not do when it is told to: refuse, fail, be late. `test_real_engine.py` has the rest.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from api import BASE, FakeEngine, Serve, Served
from prometheus_client import CollectorRegistry

from crma.models.model_shape import ModelShape
from crma.models.prompts import chat_format
from crma.store.adapter_store import AdapterStore
from server.app import create_app
from server.engine.native.adapter_pool import AdapterPool
from server.http.schemas import ServedModel
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.settings import Settings


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny.filled_store`; read only."""
    return tiny.filled_store(tmp_path_factory.mktemp("store"), BASE).root


@pytest.fixture
async def serve(root: Path) -> AsyncIterator[Serve]:
    """Starts an app with the settings given, and waits until it is ready unless told not to."""
    async with AsyncExitStack() as stack:

        async def start(*, wait: bool = True, **options: Any) -> Served:
            settings, engine = Settings(**{"store": root, **options}), FakeEngine()
            metrics = Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)
            store, tokenizer, pool = (
                AdapterStore(settings.store),
                tiny.tokenizer(),
                AdapterPool(tiny.injection(), 4),
            )
            shape = ModelShape.of(tiny.injection().model)
            registry = Registry(store, BASE, pool, chat_format(tokenizer), metrics, shape)
            model = ServedModel(name="tiny", digest=BASE.digest, dtype="float32", max_model_len=128)
            app = create_app(
                Frontend(settings, engine, registry, tokenizer, model, metrics), on_stop=engine.stop
            )
            await stack.enter_async_context(app.router.lifespan_context(app))
            if wait:
                await app.state.starting
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
            return Served(app, await stack.enter_async_context(client), engine)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """An app with the default settings, ready."""
    return await serve()
