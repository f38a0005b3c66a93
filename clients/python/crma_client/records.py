"""What the server keeps: who used how much, what administrators did, what training measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import date


class Records(Connection):
    """The records of `Client`."""

    def usage(
        self,
        first_day: date | str | None = None,
        last_day: date | str | None = None,
        *,
        key: str | None = None,
        task: str | None = None,
        by: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Sum up the tokens that this key has used, by day; with the admin key, those of all keys.

        Args:
            first_day: such as 2026-11-27, in UTC. None: 29 days before the last.
            last_day: None: today.
            key: only that of the key of this name.
            task: only that of this task; base: the base model without one.
            by: a sum for each of these: day, key, task, task_digest, crma. None: of all of them.

        Returns:
            from, to and usage, as the server sent them.
        """
        days = {"from": first_day, "to": last_day}
        path = calls.query_path("/usage", {**days, "key": key, "task": task, "by": by})
        response = self._send("GET", path)
        return calls.read_object(response)

    def audit(
        self,
        *,
        limit: int | None = None,
        before: int | None = None,
        who: str | None = None,
        what: str | None = None,
    ) -> list[Any]:
        """List what administrators did, the newest first. Needs the admin key.

        Args:
            limit: at most so many; the server gives 100 by default, and 1000 at most.
            before: the `id` of an act: only earlier ones.
            who: only acts of the key of this name.
            what: only this act, such as publish.
        """
        fields = {"limit": limit, "before": before, "who": who, "what": what}
        response = self._send("GET", calls.query_path("/audit", fields))
        return calls.read_list(response)

    def runs(self) -> list[Any]:
        """List the training runs whose records the server has."""
        response = self._send("GET", "/runs")
        return calls.read_list(response)

    def run(self, id: str) -> dict[str, Any]:
        """Get the record of a training run, with its matrices."""
        response = self._send("GET", calls.run_path(id))
        return calls.read_object(response)


class AsyncRecords(AsyncConnection):
    """The records of `AsyncClient`."""

    async def usage(
        self,
        first_day: date | str | None = None,
        last_day: date | str | None = None,
        *,
        key: str | None = None,
        task: str | None = None,
        by: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Sum up the tokens that keys have used; see `Client.usage` for the arguments."""
        days = {"from": first_day, "to": last_day}
        path = calls.query_path("/usage", {**days, "key": key, "task": task, "by": by})
        response = await self._send("GET", path)
        return calls.read_object(response)

    async def audit(
        self,
        *,
        limit: int | None = None,
        before: int | None = None,
        who: str | None = None,
        what: str | None = None,
    ) -> list[Any]:
        """List what administrators did; see `Client.audit` for the arguments."""
        fields = {"limit": limit, "before": before, "who": who, "what": what}
        response = await self._send("GET", calls.query_path("/audit", fields))
        return calls.read_list(response)

    async def runs(self) -> list[Any]:
        """List the training runs whose records the server has."""
        response = await self._send("GET", "/runs")
        return calls.read_list(response)

    async def run(self, id: str) -> dict[str, Any]:
        """Get the record of a training run, with its matrices."""
        response = await self._send("GET", calls.run_path(id))
        return calls.read_object(response)
