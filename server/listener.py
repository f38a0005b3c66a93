"""The ports of a server: bound before anything else, and how many connections they may have."""

import errno
import functools
import resource
import socket
from collections.abc import Sequence
from typing import Any, cast

from crma.core.errors import ConfigError
from server.http.connection import Connection, ConnectionLimits, Door
from server.http.refusals import Refusals
from server.service.metrics import Metrics
from server.settings import Settings

BACKLOG = 2048  # connections that wait to be accepted
MAX_DESCRIPTORS = 65_536
RESERVED_DESCRIPTORS = 256  # for the store, the model, the health port and everything else
DEFAULT_CONNECTIONS = 4096
HEALTH_CONNECTIONS = 32


def listen(settings: Settings) -> list[socket.socket]:
    """Listen on the settings' ports.

    Clients that connect before the server answers wait. Nobody else can take a port from then on,
    so that a server which starts twice ends here, before it has touched the other one's files.

    Raises:
        ConfigError: a port is in use or not allowed, or the host is none of this machine's.
    """
    sockets: list[socket.socket] = []
    try:
        for field, port in (("port", settings.port), ("health_port", settings.health_port)):
            if port is not None:
                _listen(settings.host, port, field, sockets)
    except ConfigError:
        for each in sockets:
            each.close()
        raise
    return sockets


def _listen(host: str, port: int, field: str, sockets: list[socket.socket]) -> None:
    """Add a socket for every address of a host."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        for family, address in dict.fromkeys((family, name) for family, _, _, _, name in found):
            sockets.append(_bound(family, address))
    except OSError as error:
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}",
            field=field if is_port else "host",
            value=port if is_port else host,
            allowed="a free port" if is_port else "an address of this machine",
        ) from error


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port that a server has just left can be used again.
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except OSError:
        listening.close()
        raise
    return listening


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as the system allows it. Returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_DESCRIPTORS
    if hard != resource.RLIM_INFINITY:
        most = min(hard, most)
    if soft == resource.RLIM_INFINITY:
        return most
    while most > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (ValueError, OSError):  # macOS says that there is no limit, and has one
            most //= 2
        else:
            return most
    return soft


def protocol(settings: Settings, most: int, metrics: Metrics) -> type[Connection]:
    """What uvicorn makes of each connection.

    Args:
        most: connections at once, as `max_connections` finds it.
        metrics: count the refused ones.
    """
    refusals = Refusals(metrics)
    doors = {settings.port: Door(most, refusals)}
    if settings.health_port is not None:
        doors[settings.health_port] = Door(HEALTH_CONNECTIONS, refusals)
    limits = ConnectionLimits(
        max_head_bytes=settings.max_head_bytes,
        head_timeout_s=settings.head_timeout_s,
        stall_timeout_s=settings.body_timeout_s,
    )
    made = functools.partial(Connection, limits=limits, doors=doors)
    return cast(type[Connection], made)  # uvicorn only calls it


def max_connections(settings: Settings, num_descriptors: int) -> int:
    """How many connections there may be at once.

    Args:
        num_descriptors: those of this process.

    Raises:
        ConfigError: the setting needs more descriptors than there are.
    """
    room = max(num_descriptors - RESERVED_DESCRIPTORS, num_descriptors // 2)
    wanted = settings.max_connections
    if wanted is None:
        return min(DEFAULT_CONNECTIONS, room)
    if wanted > room:
        message = f"{wanted} connections need more than the {num_descriptors} descriptors there are"
        allowed = f"<= {room}, or a higher limit of open files (ulimit -n)"
        raise ConfigError(message, field="max_connections", value=wanted, allowed=allowed)
    return wanted


def addresses(sockets: Sequence[socket.socket]) -> str:
    """Where a server listens, for the log."""
    names = [each.getsockname() for each in sockets]
    return ", ".join(f"http://{_host(name[0])}:{name[1]}" for name in names)


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
