"""One request in the engine, and the answer that has come back so far."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from crma.core.errors import StoreError
from server.engine.errors import EngineError
from server.engine.inference_engine import InferenceEngine, Outputs
from server.engine.request import FinishReason, Request, RequestOutput, Timings, TokenLogprob
from server.service.errors import AdapterUnloaded, DeadlineExceeded, Draining, GenerationFailed
from server.service.metrics import Labels, Metrics

T = TypeVar("T")
NumberedOutputs = AsyncGenerator[tuple[int, RequestOutput], None]
"""Outputs of several requests, each with the number of its request."""


@dataclass
class SequenceResult:
    """One of the n answers of a request, as far as it has come.

    last: its last output, with finish reason and totals, once it has ended.
    last_token_at: when its newest token came, in seconds of time.monotonic().
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    last: RequestOutput = field(default_factory=partial(RequestOutput, ""))
    last_token_at: float | None = None


class Generation:
    """A request, its submission to the engine, and the results of its sequences.

    Args:
        spend: is told at the end how many tokens it had, unless it was refused.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        request: Request,
        metrics: Metrics,
        labels: Labels,
        spend: Callable[[int], None],
    ) -> None:
        self.request = request
        self.sequences = [SequenceResult() for _ in range(request.sampling.n)]
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._engine = engine
        self._metrics = metrics
        self._labels = labels
        self._spend = spend

    async def outputs(self) -> Outputs:
        """Submit the request and yield its outputs, each already added to `sequences`.

        A caller that does not read to the end must close the generator: the engine then aborts
        the sequences that have not ended. A request that was refused may be submitted again.

        Raises:
            EngineError, StoreError: the request was refused and has not run.
            DeadlineExceeded, AdapterUnloaded, GenerationFailed, Draining: the engine ended it.
        """
        # Close the engine's stream here, not when the garbage collector finds it.
        async with aclosing(self._engine.submit(self.request)) as stream:
            try:
                async for output in stream:
                    self._add(output)
                    yield output
            except BaseException as error:
                self._count_failure(error)
                raise
            reason = str(self.sequences[0].last.finish_reason)
            self._metrics.count_request(self._labels, reason, self.timings())
            self._spend(self._num_tokens())

    async def finished(self) -> None:
        """Wait until every sequence has ended. Raises as `outputs`."""
        async for _ in self.outputs():
            pass

    def usage(self) -> dict[str, int]:
        """Token counts over all sequences; the prompt is counted once."""
        last_outputs = [sequence.last for sequence in self.sequences]
        return {
            "prompt_tokens": len(self.request.prompt_ids),
            "completion_tokens": sum(output.completion_tokens for output in last_outputs),
            "cached_tokens": min(output.cached_tokens for output in last_outputs),
        }

    def timings(self) -> Timings:
        """Of the whole request: the first sequence to start, the first token, the last to end."""
        last_timings = [sequence.last.timings for sequence in self.sequences]
        timings = [each for each in last_timings if each is not None]
        first_tokens = [each.ttft_s for each in timings if each.ttft_s is not None]
        return Timings(
            queue_s=min(each.queue_s for each in timings),
            ttft_s=min(first_tokens, default=None),
            e2e_s=max(each.e2e_s for each in timings),
        )

    def _add(self, output: RequestOutput) -> None:
        """Add an output to its sequence. Raises where the output says that the engine gave up."""
        _raise_failure(output)
        sequence = self.sequences[output.index]
        sequence.text += output.text
        sequence.token_ids += output.token_ids
        sequence.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        if output.token_ids:
            self._observe_gap(sequence)
        if output.finish_reason is not None:
            sequence.last = output

    def _observe_gap(self, sequence: SequenceResult) -> None:
        """Record the time since the sequence's token before this one."""
        now = time.monotonic()
        if sequence.last_token_at is not None:
            self._metrics.itl.labels(*self._labels).observe(now - sequence.last_token_at)
        sequence.last_token_at = now

    def _count_failure(self, error: BaseException) -> None:
        """Count a request that ran and did not finish; one that was refused is not counted."""
        if isinstance(error, EngineError | StoreError):
            return
        reason = "error" if isinstance(error, GenerationFailed) else "abort"
        self._metrics.count_request(self._labels, reason, None)
        self._spend(self._num_tokens())

    def _num_tokens(self) -> int:
        """Tokens of the prompt, and of the answers as far as they have come."""
        sampled = sum(len(sequence.token_ids) for sequence in self.sequences)
        return len(self.request.prompt_ids) + sampled


def _raise_failure(output: RequestOutput) -> None:
    """Raise the error of an output with finish reason error or abort."""
    if output.finish_reason is FinishReason.ERROR:
        raise GenerationFailed(output.error or "the engine failed on this request")
    if output.finish_reason is not FinishReason.ABORT:
        return
    if output.error == "deadline":
        message = "the request's deadline passed before it was done"
        raise DeadlineExceeded(message, field="timeout_s")
    if output.error == "unloaded":
        raise AdapterUnloaded("its adapter was unloaded by an administrator", field="task")
    raise Draining("the request was aborted: the server is stopping")


async def outputs_of(generations: Sequence[Generation]) -> NumberedOutputs:
    """Submit requests, and yield the outputs of all as they come.

    The first failure ends the others, as closing the generator does. Raises as
    `Generation.outputs`.
    """
    if len(generations) == 1:
        async with aclosing(generations[0].outputs()) as outputs:
            async for output in outputs:
                yield 0, output
        return
    arrived: asyncio.Queue[tuple[int, RequestOutput | Exception | None]] = asyncio.Queue()
    readers = [asyncio.create_task(_read(*each, arrived)) for each in enumerate(generations)]
    try:
        num_open = len(readers)
        while num_open:
            number, arrival = await arrived.get()
            if isinstance(arrival, Exception):
                raise arrival
            if arrival is None:
                num_open -= 1
            else:
                yield number, arrival
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    number: int,
    generation: Generation,
    arrived: asyncio.Queue[tuple[int, RequestOutput | Exception | None]],
) -> None:
    """Put the outputs of a request into a queue as they come, then its error, or None."""
    try:
        async for output in generation.outputs():
            arrived.put_nowait((number, output))
    except Exception as error:
        arrived.put_nowait((number, error))
    else:
        arrived.put_nowait((number, None))


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; the first failure cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
