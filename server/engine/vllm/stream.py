"""A request that the engine has taken: where its outputs go, and what has become of it."""

import asyncio
import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.inference_engine import Outputs
from server.engine.request import FinishReason, Request, RequestOutput
from server.engine.vllm.answer import Answer


@dataclass(eq=False)
class Stream:
    """One request on its way through the engine.

    Attributes:
        request: it.
        answers: one for each of its sequences.
        has_begun: vLLM has it, and its adapters are in use.
        tasks: they read what vLLM says of its sequences.
        timer: ends it at its deadline.
    """

    request: Request
    answers: Sequence[Answer]
    has_begun: bool = False
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    timer: asyncio.TimerHandle | None = None
    _queue: asyncio.Queue[RequestOutput] = field(default_factory=asyncio.Queue)

    @property
    def num_open(self) -> int:
        """Sequences that are not finished."""
        return sum(not answer.is_finished for answer in self.answers)

    def put(self, output: RequestOutput) -> None:
        """Hand out an output."""
        self._queue.put_nowait(output)

    def end(
        self, reason: FinishReason, error: str | None = None, cause: Exception | None = None
    ) -> None:
        """End the sequences that are not finished, and what reads them."""
        for answer in self.answers:
            self.end_answer(answer, reason, error, cause)
        for task in self.tasks:
            task.cancel()
        self.close()

    def end_answer(
        self,
        answer: Answer,
        reason: FinishReason,
        error: str | None = None,
        cause: Exception | None = None,
    ) -> None:
        """End one sequence, unless it is finished."""
        if not answer.is_finished:
            self.put(answer.end(reason, error, cause))

    def close(self) -> None:
        """Stop its timer: nothing of it is open any more."""
        if self.timer is not None:
            self.timer.cancel()

    async def outputs(self) -> Outputs:
        """Its outputs, until every sequence has had its last."""
        num_left = len(self.answers)
        while num_left:
            output = await self._queue.get()
            if output.cause is not None:
                # A copy: one instance raised in many streams would gather their tracebacks.
                raise copy.copy(output.cause)
            if output.finish_reason is not None:
                num_left -= 1
            yield output
