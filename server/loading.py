"""What a server answers while its model loads: that it lives, and that it cannot serve yet.

The ports are bound before that, and clients whom nobody answers would wait for as long as it takes.
"""

import asyncio
import logging
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import uvicorn
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from server.http.connection import Connection
from server.http.error_handlers import error_response
from server.http.security_headers import SecurityHeaders
from server.service.errors import Loading

NOT_READY: dict[str, object] = {
    "status": "not_ready",
    "reason": "loading",
    "problems": {},
    "store_problem": None,
}
EMPTY = ("/health", "/ping")  # the routes about readiness whose answers have no body

_THREAD = "loading"
TICK_S = 0.1  # as often as uvicorn looks whether to end, and sets the time of its answers
_uvicorn = logging.getLogger("uvicorn.error")


@contextmanager
def answering(sockets: Sequence[socket.socket], protocol: type[Connection]) -> Iterator[None]:
    """Answer on listening sockets for as long as the block runs, in a thread of its own.

    After the block no request is taken any more. The thread may end later: uvicorn gives those that
    are being answered a moment.

    Args:
        sockets: stay open. Who connects after the block waits for the next server.
        protocol: what each connection becomes.
    """
    config = uvicorn.Config(
        SecurityHeaders(_answer),
        http=protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=1,
    )
    server = _LoadingServer(config)
    own = [each.dup() for each in sockets]  # uvicorn closes them
    thread = threading.Thread(target=server.run, args=(own,), name=_THREAD)
    thread.start()
    try:
        yield
    finally:
        server.leave()


class _LoadingServer(uvicorn.Server):
    """A server that leaves its sockets as soon as it is told to."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = Future[None]()
        self._has_left = threading.Event()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        _uvicorn.addFilter(self._is_of_another_server)
        try:
            super().run(sockets)
        finally:
            self._has_left.set()
            _uvicorn.removeFilter(self._is_of_another_server)

    def leave(self) -> None:
        """Return once no request is taken any more. Call it in another thread."""
        self.should_exit = True
        self._told.set_result(None)
        self._has_left.wait()

    async def main_loop(self) -> None:
        """As uvicorn's, which only looks ten times a second whether it should end."""
        told = asyncio.wrap_future(self._told)
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            await asyncio.wait({told}, timeout=TICK_S)
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0)  # those that wait for a request are closed now
        self._has_left.set()

    def _is_of_another_server(self, record: logging.LogRecord) -> bool:
        """Whether to log it: that this server starts and ends would be taken for the real one's."""
        return record.levelno > logging.INFO or record.threadName != _THREAD


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    await _response(scope["path"])(scope, receive, send)


def _response(path: str) -> Response:
    if path == "/healthz":
        return JSONResponse({"status": "alive"})
    error = Loading("the model is being loaded; try again")
    if path == "/readyz":
        return JSONResponse(NOT_READY, error.status, error.headers)
    if path in EMPTY:
        return Response(None, error.status, error.headers)
    return error_response(error, path)
