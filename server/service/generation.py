"""One request in the engine, and the answer that has come back so far."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from prometheus_client import Histogram

from crma.core.errors import StoreError
from server.engine.errors import ConstraintStuck, EngineError, EngineStopped
from server.engine.inference_engine import InferenceEngine, Outputs
from server.engine.request import FinishReason, Request, RequestOutput, Timings, TokenLogprob
from server.service.errors import (
    AdapterUnloaded,
    DeadlineExceeded,
    Draining,
    GenerationFailed,
    ReplicaLost,
    ServerStopped,
    to_api_error,
)
from server.service.metrics import Metrics
from server.service.outcome import Labels, Outcome
from server.service.telemetry import Telemetry

T = TypeVar("T")
ABORTED = "aborted"  # the code of a request whose caller has gone, or has given up on it
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

    @property
    def num_tokens(self) -> int:
        """The length of the answer, as far as it has come."""
        return max(self.last.completion_tokens, len(self.token_ids))


class Generation:
    """A request, its submission to the engine, and the results of its sequences.

    Args:
        labels: of the request in the metrics.
        count: is told how it ended, unless it was refused.
        task: the store name of its task adapter; None: the base model.
        own_deadline: its client chose the deadline.
        telemetry: told of the request where it has run; None: traces are off.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        request: Request,
        metrics: Metrics,
        labels: Labels,
        count: Callable[[Outcome], None],
        *,
        task: str | None = None,
        own_deadline: bool = False,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.request = request
        self.task = task
        self.error: str | None = None  # the code of what ended it, if it did not finish
        self.has_run = False  # and has ended: it was not refused
        self.sequences = [SequenceResult() for _ in range(request.sampling.n)]
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._engine = engine
        self._metrics = metrics
        self._labels = labels
        self._count = count
        self._own_deadline = own_deadline
        self._telemetry = telemetry
        self._trace = None if telemetry is None else telemetry.current_trace()

    async def outputs(self) -> Outputs:
        """Submit the request and yield its outputs, each already added to `sequences`.

        A caller that does not read to the end must close the generator: the engine then aborts
        the sequences that have not ended. A request that was refused may be submitted again.

        Raises:
            EngineError, StoreError: the request was refused and has not run.
            ConstraintStuck, DeadlineExceeded, AdapterUnloaded, ReplicaLost, GenerationFailed,
            ServerStopped: the engine ended it.
        """
        # Close the engine's stream here, not when the garbage collector finds it.
        async with aclosing(self._engine.submit(self.request)) as stream:
            try:
                async for output in stream:
                    self._add(output)
                    yield output
            except BaseException as error:
                self._note_failure(error)
                raise
            self._report()

    async def finished(self) -> None:
        """Wait until every sequence has ended. Raises as `outputs`."""
        self.request = replace(self.request, is_streamed=False)
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

    def outcome(self) -> Outcome:
        """What has come of the request so far."""
        is_fault = self.error == GenerationFailed.code
        missing = FinishReason.ERROR if is_fault else FinishReason.ABORT
        lasts = [sequence.last for sequence in self.sequences]
        has_finished = all(last.timings is not None for last in lasts)
        return Outcome(
            request=self.request,
            task=self.task,
            labels=self._labels,
            reasons=tuple(last.finish_reason or missing for last in lasts),
            output_tokens=tuple(sequence.num_tokens for sequence in self.sequences),
            cached_tokens=min(last.cached_tokens for last in lasts),
            timings=self.timings() if has_finished and self.error is None else None,
            error=self.error,
            own_deadline=self._own_deadline,
        )

    def _add(self, output: RequestOutput) -> None:
        """Add an output to its sequence. Raises where the output says that the engine gave up."""
        _raise_failure(output)
        sequence = self.sequences[output.index]
        sequence.text += output.text
        sequence.token_ids += output.token_ids
        sequence.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        if output.token_ids and self.request.interactive:
            self._observe_gap(sequence)
        if output.finish_reason is not None:
            sequence.last = output

    def _observe_gap(self, sequence: SequenceResult) -> None:
        """Record the time since the sequence's token before this one."""
        now = time.monotonic()
        if sequence.last_token_at is not None:
            self._gaps.observe(now - sequence.last_token_at)
        sequence.last_token_at = now

    @cached_property
    def _gaps(self) -> Histogram:
        """The metric of its labels; to look that up takes as long as to count."""
        return self._metrics.gaps(self._labels)

    def _note_failure(self, error: BaseException) -> None:
        """Keep what ended a request; report one that ran, and none that was refused."""
        self.error = to_api_error(error).code if isinstance(error, Exception) else ABORTED
        is_refusal = isinstance(error, EngineError | StoreError)
        if not is_refusal or isinstance(error, ConstraintStuck):
            self._report()

    def _report(self) -> None:
        """Count the request, and trace it if traces are on."""
        self.has_run = True
        outcome = self.outcome()
        self._metrics.count_request(outcome)
        if self._telemetry is not None:
            self._telemetry.record(outcome, self._trace)
        self._count(outcome)


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
    if output.error == "lost":
        raise ReplicaLost("the replica that ran the request has ended; send it again")
    raise ServerStopped("the request was aborted: the server is stopping")


@contextmanager
def already_begun() -> Iterator[None]:
    """Work of which a part may have run: what is refused because the server stops is
    ServerStopped.
    """
    try:
        yield
    except (Draining, EngineStopped) as error:
        raise ServerStopped("the server stopped before all of the request was done") from error


async def all_finished(generations: Sequence[Generation]) -> None:
    """Submit requests, and wait until all have ended. Fails as `outputs_of`."""
    if len(generations) == 1:
        await generations[0].finished()
        return
    with already_begun():
        await all_of(each.finished() for each in generations)


async def outputs_of(generations: Sequence[Generation]) -> NumberedOutputs:
    """Submit requests, and yield the outputs of all as they come.

    The first failure ends the others, as closing the generator does. Raises as
    `Generation.outputs`; of several requests, one that is refused because the server stops is
    ServerStopped: others may have begun.
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
                with already_begun():
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
