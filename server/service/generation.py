"""One request in the engine, and what has come back of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from crma.core.errors import StoreError
from server.engine.errors import EngineError
from server.engine.native.async_engine import AsyncEngine
from server.engine.request import FinishReason, Request, RequestOutput, Timings, TokenLogprob
from server.service import errors
from server.service.metrics import Labels, Metrics

T = TypeVar("T")
Outputs = AsyncGenerator[RequestOutput, None]


@dataclass
class SequenceResult:
    """One of n answers, as far as it has come; `last` is its last output, with reason and totals, once it has ended.
    `newest`: when its newest token came, in seconds of time.monotonic().
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: RequestOutput = field(default_factory=partial(RequestOutput, ""))
    newest: float | None = None


class Generation:
    """One request in the engine."""

    def __init__(
        self, engine: AsyncEngine, request: Request, metrics: Metrics, labels: Labels
    ) -> None:
        self.request = request
        self.sequences = [SequenceResult() for _ in range(request.sampling.n)]
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._engine = engine
        self._metrics, self._labels = metrics, labels

    async def outputs(self) -> Outputs:
        """Submits, and gives outputs as they come, already added to `sequences`. Who does not read them to their end
        closes this: then the engine aborts what has not ended. A refused request may be submitted again.

        Raises:
            EngineError, StoreError: refused; nothing has run.
            DeadlineExceeded, AdapterUnloaded, GenerationFailed, Draining: the engine gave up on the request.
        """
        # Closed now, and not when the garbage collector comes to it.
        async with aclosing(self._engine.submit(self.request)) as stream:  # type: ignore[type-var]
            try:
                async for output in stream:
                    self._take(output)
                    yield output
                self._metrics.ended(
                    self._labels, str(self.sequences[0].last.finish_reason), self.timings()
                )
            except BaseException as error:
                if not isinstance(error, EngineError | StoreError):
                    reason = "error" if isinstance(error, errors.GenerationFailed) else "abort"
                    self._metrics.ended(self._labels, reason, None)
                raise

    async def finished(self) -> None:
        """Waits until every sequence has ended. Raises as `outputs`."""
        async for _ in self.outputs():
            pass

    def usage(self) -> dict[str, int]:
        """Tokens over all sequences; the prompt is counted once."""
        ended = [sequence.last for sequence in self.sequences]
        new, cached = (
            sum(each.completion_tokens for each in ended),
            min(each.cached_tokens for each in ended),
        )
        return {
            "prompt_tokens": len(self.request.prompt_ids),
            "completion_tokens": new,
            "cached_tokens": cached,
        }

    def timings(self) -> Timings:
        """Of the whole request: the first sequence to start, the first token of any, the last to end."""
        times = [
            sequence.last.timings
            for sequence in self.sequences
            if sequence.last.timings is not None
        ]
        first_token = min((each.ttft_s for each in times if each.ttft_s is not None), default=None)
        return Timings(
            min(each.queue_s for each in times), first_token, max(each.e2e_s for each in times)
        )

    def _take(self, output: RequestOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            raise errors.GenerationFailed(output.error or "the engine failed on this request")
        if output.finish_reason is FinishReason.ABORT:
            if output.error == "deadline":
                raise errors.DeadlineExceeded(
                    "the request's deadline passed before it was done", field="timeout_s"
                )
            if output.error == "unloaded":
                raise errors.AdapterUnloaded(
                    "its adapter was unloaded by an administrator", field="task"
                )
            raise errors.Draining("the request was aborted: the server is stopping")
        sequence = self.sequences[output.index]
        sequence.text += output.text
        sequence.token_ids += output.token_ids
        sequence.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        if output.token_ids:
            before, sequence.newest = sequence.newest, time.monotonic()
            if before is not None:
                self._metrics.itl.labels(*self._labels).observe(sequence.newest - before)
        if output.finish_reason is not None:
            sequence.last = output


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results; the first to fail cancels, and so aborts, the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
