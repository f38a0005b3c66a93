"""A server that a command talks to, through `crma_client`: no other module of `crma` imports it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crma.core.errors import ConfigError, CrmaError, ServerError

if TYPE_CHECKING:
    from crma_client import Client


@contextmanager
def connected(server: str, key_file: Path | None, *, timeout: float = 120.0) -> Iterator["Client"]:
    """A client of a server for the block, in which its errors become errors of `crma`.

    Args:
        server: its address.
        key_file: holds the key that it asks for; None: no key is sent.
        timeout: seconds to wait for each part of an answer.

    Raises:
        ConfigError: the address or the key cannot be sent, or the server refuses what was asked.
        ServerError: it cannot be reached, or failed; or crma_client is not installed.
    """
    try:
        from crma_client import Client, errors
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: pip install 'crma-server[client]'"
        raise ServerError(message, field="crma_client") from error
    key = key_file.read_text("utf-8").strip() if key_file else None
    try:
        with Client(server, api_key=key, timeout=timeout) as client:
            yield client
    except errors.CrmaClientError as error:
        raise _translated(error, server) from error


def _translated(error: Exception, server: str) -> CrmaError:
    """An error of the client as one of `crma`, which says what to do where that is known."""
    from crma_client import errors

    assert isinstance(error, errors.CrmaClientError)
    details: dict[str, Any] = {
        "field": error.field or server,
        "value": error.value,
        "allowed": error.allowed,
    }
    wrong_use = (errors.InvalidArgument, errors.InvalidRequest, errors.NotFound)
    if isinstance(error, wrong_use):
        return ConfigError(error.message, **details)
    message = error.message
    if isinstance(error, errors.NotAuthorized):
        message += " Name a file with a key: --key-file"
    elif isinstance(error, errors.ConnectionFailed):
        message += ". Start one with `crma serve`, or name another with --server"
    return ServerError(message, **details)
