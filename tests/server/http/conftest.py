"""The real app over ASGI, with a real store and tokenizer, on a scripted engine.

A test can tell a scripted engine to refuse, fail or be late. `test_real_engine.py` tests the app
on a real one.
"""

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from api import BASE, Serve, Served
from prometheus_client import CollectorRegistry
from scripted_engine import ScriptedEngine

from crma.models.model_shape import ModelShape
from crma.models.prompts import BASE_TEMPLATE
from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES
from server.app import create_app
from server.service.frontend import Frontend
from server.service.metrics import Metrics
from server.service.registry import Registry
from server.settings import Settings


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a store with two tasks and a backbone (`tiny.filled_store`). Read only."""
    return tiny.filled_store(tmp_path_factory.mktemp("store"), BASE).root


@pytest.fixture
async def serve(root: Path, tmp_path: Path) -> AsyncIterator[Serve]:
    """Starts an app with the settings given; waits until it is ready unless `wait=False`.

    `adapters` is the store, in place of that of the settings.
    """
    async with AsyncExitStack() as stack:

        async def start(
            *,
            wait: bool = True,
            engine: ScriptedEngine | None = None,
            adapters: AdapterStore | None = None,
            **options: Any,
        ) -> Served:
            own = {"store": root, "evaluations": tmp_path / "evaluations", "allowed_hosts": "test"}
            settings = Settings(**{**own, **options})
            engine = engine or ScriptedEngine()
            metrics = Metrics(CollectorRegistry(), max_adapter_labels=settings.max_adapter_labels)
            tokenizer = tiny.tokenizer()
            registry = Registry(
                store=adapters or AdapterStore(settings.store, settings.require_signature),
                base=BASE,
                engine=engine,
                base_format=BASE_TEMPLATE,
                metrics=metrics,
                shape=ModelShape.of(tiny.injection().model),
            )
            app = create_app(Frontend(settings, engine, registry, tokenizer, metrics))
            running = await stack.enter_async_context(AsyncExitStack())
            await running.enter_async_context(app.router.lifespan_context(app))
            if wait:
                await app.state.starting
            client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
            return Served(app, await running.enter_async_context(client), engine, running)

        yield start


@pytest.fixture
async def served(serve: Serve) -> Served:
    """A ready app with the default settings."""
    return await serve()


@pytest.fixture
def own(tmp_path: Path) -> AdapterStore:
    """A store of the test's own: `tiny.filled_store`."""
    return tiny.filled_store(tmp_path / "store", BASE)


@pytest.fixture
def peft(tmp_path: Path) -> Path:
    """A PEFT folder below the import root "imports", with other weights than the store has."""
    store = AdapterStore(tmp_path / "elsewhere")
    entry = tiny.publish(store, BASE, "other", 9)
    folder = tmp_path / "imports" / "new"
    folder.mkdir(parents=True)
    for name in TASK_FILES:
        shutil.copy(entry.path / name, folder / name)
    return folder
