"""server.listener: ports, descriptors, and how many connections there may be."""

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry

from crma.core.errors import ConfigError
from server.listener import (
    DEFAULT_CONNECTIONS,
    RESERVED_DESCRIPTORS,
    addresses,
    listen,
    max_connections,
    protocol,
    raise_descriptor_limit,
)
from server.service.metrics import Metrics
from server.settings import Settings


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def test_a_port_that_is_listened_on_is_taken_at_once(port: int, stack: ExitStack) -> None:
    for each in listen(Settings(port=port)):
        stack.enter_context(each)
    with pytest.raises(ConfigError) as caught:
        listen(Settings(port=port))
    assert (caught.value.field, caught.value.value) == ("port", port)
    assert f"127.0.0.1:{port}" in caught.value.message
    stack.enter_context(socket.create_connection(("127.0.0.1", port)))


def test_the_health_port_is_named_if_it_is_taken(port: int, stack: ExitStack) -> None:
    for each in listen(Settings(port=port)):
        stack.enter_context(each)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
    with pytest.raises(ConfigError) as caught:
        listen(Settings(port=other, health_port=port))
    assert caught.value.field == "health_port"
    for each in listen(Settings(port=other)):  # the first port was not left open
        stack.enter_context(each)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host"])
def test_a_host_that_is_not_this_machine_is_named(host: str, port: int) -> None:
    with pytest.raises(ConfigError) as caught:
        listen(Settings(host=host, port=port))
    assert (caught.value.field, caught.value.value) == ("host", host)


def test_both_ports_are_listened_on_and_shown(port: int, stack: ExitStack) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
    sockets = listen(Settings(port=port, health_port=other))
    for each in sockets:
        stack.enter_context(each)
    assert addresses(sockets) == f"http://127.0.0.1:{port}, http://127.0.0.1:{other}"


def test_the_limit_of_descriptors_is_raised_as_far_as_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        found = raise_descriptor_limit()
        assert found == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert found > 512
        assert raise_descriptor_limit() == found
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("num_descriptors", "most"),
    [(65_536, DEFAULT_CONNECTIONS), (1024, 1024 - RESERVED_DESCRIPTORS), (256, 128)],
)
def test_connections_leave_descriptors_for_everything_else(num_descriptors: int, most: int) -> None:
    assert max_connections(Settings(), num_descriptors) == most


def test_more_connections_than_descriptors_are_refused_by_name() -> None:
    with pytest.raises(ConfigError) as caught:
        max_connections(Settings(max_connections=800), 1024)
    assert (caught.value.field, caught.value.value) == ("max_connections", 800)
    assert "<= 768" in str(caught.value.allowed)
    assert max_connections(Settings(max_connections=768), 1024) == 768


def test_the_health_port_has_connections_of_its_own() -> None:
    settings = Settings(health_port=9)
    doors = protocol(settings, 100, Metrics(CollectorRegistry())).keywords["doors"]
    assert doors[settings.port].max_connections == 100
    assert doors[9] is not doors[settings.port]
