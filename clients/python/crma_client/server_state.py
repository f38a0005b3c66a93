"""The state of the server itself: whether it lives and is ready, its version, its metrics."""

from __future__ import annotations

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.connection import Connection
from crma_client.types import read


class ServerState(Connection):
    """What `Client` says of its server."""

    def health(self) -> bool:
        """Whether the server process is alive."""
        response = self._send("GET", "/healthz", accepted=[503])
        return calls.read_probe(response)

    def ready(self) -> bool:
        """Whether the server accepts requests: False while it starts or drains."""
        response = self._send("GET", "/readyz", accepted=[503])
        return calls.read_probe(response)

    def version(self) -> str:
        """Get the version of the server."""
        response = self._send("GET", "/version")
        return read(str, calls.read_object(response).get("version"))

    def metrics(self) -> str:
        """Get the server's metrics in the Prometheus text format."""
        response = self._send("GET", "/metrics")
        return calls.read_text(response)


class AsyncServerState(AsyncConnection):
    """What `AsyncClient` says of its server."""

    async def health(self) -> bool:
        """Whether the server process is alive."""
        response = await self._send("GET", "/healthz", accepted=[503])
        return calls.read_probe(response)

    async def ready(self) -> bool:
        """Whether the server accepts requests: False while it starts or drains."""
        response = await self._send("GET", "/readyz", accepted=[503])
        return calls.read_probe(response)

    async def version(self) -> str:
        """Get the version of the server."""
        response = await self._send("GET", "/version")
        return read(str, calls.read_object(response).get("version"))

    async def metrics(self) -> str:
        """Get the server's metrics in the Prometheus text format."""
        response = await self._send("GET", "/metrics")
        return calls.read_text(response)
