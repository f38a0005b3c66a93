"""Ablations: variants compared on a question set, at once or as background jobs."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing, closing, suppress
from typing import TYPE_CHECKING, Any

from crma_client import calls
from crma_client.async_connection import AsyncConnection
from crma_client.connection import Connection
from crma_client.errors import ConnectionFailed, CrmaClientError
from crma_client.job_events import POLL_S, ProgressReader
from crma_client.types import read

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

    from crma_client.job_events import OnProgress


class Ablations(Connection):
    """The ablations of `Client`."""

    def ablation(self, **body: Any) -> dict[str, Any]:
        """Compare variants on a question set and wait for the report, for at most `timeout`.

        The server judges the arguments, which are the fields of POST /ablation.

        Args:
            question_set: name of a set on the server. Give either this or `questions`.
            questions: objects with id, task, question, answers (each of them is right) and,
                optionally, choices.
            tasks: ask only the questions of these tasks.
            variants: base, task, crma or task+crma; versions are named as task@v2+crma@v1.
            scorer: how an answer is compared with the right ones.
            tolerance: largest absolute error that the scorer `numeric` accepts.
            relative_tolerance: largest relative error that it accepts.
            max_tokens: length limit of each answer.
            temperature: 0 is greedy.
            seed: seed of the bootstrap and, unless temperature is 0, of the sampling.
            margin: difference in accuracy within which two variants count as equivalent.
            repeat: run each variant separately, even those that resolve to the same adapters.
            choices: texts, one of which every answer has to be; "own": those of its question.
            timeout_s: deadline of each question, in seconds.
            background: return at once with the id of a job, which `ablation_job` takes.
            provenance: the provenance of an earlier report; the server answers 409 (Conflict) if
                anything in it has changed since.

        Returns:
            The report, or the started job, as the server sent it.
        """
        response = self._send("POST", "/ablation", calls.write_body(body))
        return calls.read_object(response)

    def ablation_jobs(self) -> list[Any]:
        """List the background jobs of your key, newest first, without requests and results."""
        response = self._send("GET", "/ablation")
        return calls.read_list(response)

    def run_ablation(self, on_progress: OnProgress | None = None, **body: Any) -> dict[str, Any]:
        """Run an ablation as a background job, and wait for its report however long it takes.

        Args:
            on_progress: called with (done, total) at the start and whenever something is done.
            body: the arguments of `ablation`, without background.

        Returns:
            The report.

        Raises:
            JobFailed: the job failed, or somebody cancelled it.
            ConnectionFailed: the connection was lost for longer than the retries. The job goes on:
                `wait_for_ablation` takes its id, which is the `value` of the error.

        Any other exception, such as Ctrl-C or one of `on_progress`, cancels the job.
        """
        started = self.ablation(**{**body, "background": True})
        id = read(str, started.get("id"))
        try:
            return self.wait_for_ablation(id, on_progress)
        except CrmaClientError as error:
            error.value = error.value or id
            raise
        except BaseException:
            with suppress(CrmaClientError):
                self.cancel_ablation(id)
            raise

    def wait_for_ablation(self, id: str, on_progress: OnProgress | None = None) -> dict[str, Any]:
        """Wait for the report of a background job; see `run_ablation`."""
        while True:
            # After a lost connection the job is asked for, which may raise.
            with suppress(ConnectionFailed), closing(self._progress(id)) as progress:
                for done, total in progress:
                    if on_progress is not None:
                        on_progress(done, total)
            result = calls.job_result(self.ablation_job(id))
            if result is not None:
                return result
            time.sleep(POLL_S)

    def _progress(self, id: str) -> Generator[tuple[int, int]]:
        """Yield (done, total) of a job until its events end."""
        reader = ProgressReader()
        with self._opened("GET", calls.events_path(id)) as response, calls.transport_errors():
            for chunk in response.iter_bytes():
                yield from reader.feed(chunk)

    def ablation_job(self, id: str) -> dict[str, Any]:
        """Get the status, progress and request of a background job and, once done, its result."""
        response = self._send("GET", calls.ablation_path(id))
        return calls.read_object(response)

    def cancel_ablation(self, id: str) -> dict[str, Any]:
        """Cancel a background job if it is still running; its record stays."""
        response = self._send("DELETE", calls.ablation_path(id))
        return calls.read_object(response)


class AsyncAblations(AsyncConnection):
    """The ablations of `AsyncClient`."""

    async def ablation(self, **body: Any) -> dict[str, Any]:
        """Compare variants on a question set; see `Client.ablation` for the arguments."""
        response = await self._send("POST", "/ablation", calls.write_body(body))
        return calls.read_object(response)

    async def ablation_jobs(self) -> list[Any]:
        """List the background jobs of your key, newest first, without requests and results."""
        response = await self._send("GET", "/ablation")
        return calls.read_list(response)

    async def run_ablation(
        self, on_progress: OnProgress | None = None, **body: Any
    ) -> dict[str, Any]:
        """Run an ablation as a background job, and wait for its report; see `Client.run_ablation`.

        Cancelling the task that waits cancels the job.
        """
        started = await self.ablation(**{**body, "background": True})
        id = read(str, started.get("id"))
        try:
            return await self.wait_for_ablation(id, on_progress)
        except CrmaClientError as error:
            error.value = error.value or id
            raise
        except BaseException:
            with suppress(CrmaClientError):
                await self.cancel_ablation(id)
            raise

    async def wait_for_ablation(
        self, id: str, on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """Wait for the report of a background job; see `Client.run_ablation`."""
        while True:
            # After a lost connection the job is asked for, which may raise.
            with suppress(ConnectionFailed):
                async with aclosing(self._progress(id)) as progress:
                    async for done, total in progress:
                        if on_progress is not None:
                            on_progress(done, total)
            result = calls.job_result(await self.ablation_job(id))
            if result is not None:
                return result
            await asyncio.sleep(POLL_S)

    async def _progress(self, id: str) -> AsyncGenerator[tuple[int, int]]:
        """Yield (done, total) of a job until its events end."""
        reader = ProgressReader()
        async with self._opened("GET", calls.events_path(id)) as response:
            with calls.transport_errors():
                async for chunk in response.aiter_bytes():
                    for progress in reader.feed(chunk):
                        yield progress

    async def ablation_job(self, id: str) -> dict[str, Any]:
        """Get the status, progress and request of a background job and, once done, its result."""
        response = await self._send("GET", calls.ablation_path(id))
        return calls.read_object(response)

    async def cancel_ablation(self, id: str) -> dict[str, Any]:
        """Cancel a background job if it is still running; its record stays."""
        response = await self._send("DELETE", calls.ablation_path(id))
        return calls.read_object(response)
