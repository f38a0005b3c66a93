"""What a server answers while its model loads: that it lives, and that it cannot serve yet.

The ports are bound before that, and clients whom nobody answers would wait for as long as it takes.
"""

import logging
import socket
import threading
from collections.abc import Iterator, Sequence
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
_uvicorn = logging.getLogger("uvicorn.error")


@contextmanager
def answering(sockets: Sequence[socket.socket], protocol: type[Connection]) -> Iterator[None]:
    """Answer on listening sockets for as long as the block runs, in a thread of its own.

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
    server = uvicorn.Server(config)
    own = [each.dup() for each in sockets]  # uvicorn closes them
    thread = threading.Thread(target=server.run, args=(own,), name=_THREAD)
    _uvicorn.addFilter(_is_of_another_server)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        _uvicorn.removeFilter(_is_of_another_server)


def _is_of_another_server(record: logging.LogRecord) -> bool:
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
