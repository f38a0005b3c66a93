"""The app on a tiny model behind a real socket, in a thread: ASGI alone does not stream."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny
import uvicorn

from crma.models.base_model import BaseModel


@contextmanager
def socket_server(base: BaseModel, store: Path) -> Iterator[str]:
    """A server for the block, whose key is "key". Yields its address."""
    started: list[Any] = []
    ready = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(serve(base, store, started, ready)), daemon=True
    )
    thread.start()
    assert ready.wait(60)
    server, port = started
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
    assert not thread.is_alive()


async def serve(base: BaseModel, store: Path, started: list[Any], ready: threading.Event) -> None:
    async with tiny.serving(base, store, api_keys=("key",), allowed_hosts="127.0.0.1") as app:
        config = uvicorn.Config(app, port=0, lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        running = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        started += [server, server.servers[0].sockets[0].getsockname()[1]]
        ready.set()
        await running
