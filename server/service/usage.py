"""How many tokens each key has used, by task and day.

What a request used is added up in memory, and the sums go into the records every few seconds. So a
request waits for no database, and a server that is killed loses what came since the last time.
"""

import asyncio
import logging
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from server.records import usage as rows
from server.records.database import Database
from server.records.errors import RecordsError
from server.records.usage import Amount, Column, Filter, Use, Write
from server.service.errors import InvalidField
from server.service.metrics import Metrics
from server.service.outcome import Outcome

log = logging.getLogger("server")

MAX_SUMS = 10_000
_MAX_WAITING = 100_000  # sums, while the database does not take them


class Usage:
    """What the requests of this server use. Only the event loop uses it.

    Args:
        database: has what was used before, by the requests of all servers.
        flush_s: seconds between writes.
        metrics: count writes that fail.
    """

    def __init__(self, database: Database, flush_s: float, metrics: Metrics) -> None:
        self._database = database
        self._flush_s = flush_s
        self._failures = metrics.record_failures.labels("usage")
        self._server = uuid.uuid4().hex
        self._num_writes = 0
        self._leaving: dict[Use, Amount] = {}  # what the last write has, unless it has succeeded
        self._waiting: dict[Use, Amount] = {}
        self._flushing = asyncio.Lock()
        self._is_stopping = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._problem: str | None = None

    def count(self, key: str, outcome: Outcome) -> None:
        """Count a request that ends now, on this day.

        Args:
            key: its name.
        """
        selection = outcome.request.selection
        use = Use(
            _today(),
            key,
            outcome.task or "",
            selection.task_digest or "",
            selection.crma_digest is not None,
        )
        amount = Amount(1, outcome.prompt_tokens, outcome.cached_tokens, sum(outcome.output_tokens))
        before = self._waiting.get(use)
        if before is not None:
            self._waiting[use] = before.plus(amount)
        elif len(self._waiting) < _MAX_WAITING:
            self._waiting[use] = amount
        else:
            self._failures.inc()

    def start(self) -> None:
        """Write every `flush_s` seconds from now on."""
        self._loop = asyncio.create_task(self._flush_again_and_again())

    async def stop(self) -> None:
        """Write what is left."""
        self._is_stopping.set()
        if self._loop is not None:
            await asyncio.wait({self._loop})  # cancelled, it could not know what it has written
        await self.flush()  # what failed before, if anything did
        await self.flush()
        num_lost = sum(each.requests for each in (*self._leaving.values(), *self._waiting.values()))
        if num_lost:
            log.error("the usage of %d requests is lost", num_lost)

    async def flush(self) -> None:
        """Add what waits to the records, in one transaction. If they cannot be written, the same
        is tried again the next time: it may have been written although no answer came."""
        async with self._flushing:
            if not self._leaving:
                self._leaving, self._waiting = self._waiting, {}
                self._num_writes += 1
            if self._leaving:
                await self._write(Write(self._server, self._num_writes, _today()))

    async def totals(self, wanted: Filter, by: Sequence[Column]) -> list[dict[str, Any]]:
        """Sums of what all servers have written, one for each value of the columns `by`.

        Raises:
            InvalidField: they are too many for an answer.
            RecordsError: the records do not answer.
        """
        sums = await self._database.run_if_made([], rows.totals, wanted, by, MAX_SUMS + 1)
        if len(sums) > MAX_SUMS:
            message = f"over {MAX_SUMS} sums: ask for fewer days, or for sums by fewer columns"
            raise InvalidField(message, field="by", value=list(by), allowed=f"<= {MAX_SUMS} sums")
        return sums

    async def _write(self, write: Write) -> None:
        try:
            await self._database.run(rows.add, write, self._leaving)
        except RecordsError as error:
            self._failures.inc()
            if error.message != self._problem:  # once, not at every try
                log.error("usage is not in the records, and waits: %s", error.message)
            self._problem = error.message
            return
        except Exception:
            self._failures.inc()
            log.exception("some usage is lost")
        self._leaving = {}
        self._problem = None

    async def _flush_again_and_again(self) -> None:
        while not self._is_stopping.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._flush_s):
                    await self._is_stopping.wait()
            await self.flush()


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def remove_old(connection: Connection, kept_s: float) -> None:
    """Remove the days that ended longer ago than so many seconds."""
    last = datetime.now(UTC) - timedelta(seconds=kept_s)
    rows.remove_old(connection, last.date().isoformat())
