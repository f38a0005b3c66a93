"""An `InferenceEngine` that follows a script: a test tells it to answer, refuse, fail or be late.

Its adapters are real: they are loaded into a native adapter pool, for the tiny model.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

import tiny

from server.engine.errors import EngineStopped, PromptTooLong, QueueFull
from server.engine.inference_engine import Outputs, ServedModel
from server.engine.native.adapter_pool import AdapterPool, Loader
from server.engine.native.constraint import Constraints
from server.engine.request import (
    Constraint,
    EngineStats,
    FinishReason,
    Request,
    RequestOutput,
    Timings,
    TokenLogprob,
)

TINY = ServedModel("tiny", "sha256:" + "b" * 64, "float32", max_model_len=128, num_tokens=300)
FIRST_TOKEN = 5

Ending = tuple[FinishReason, str | None]


def logprobs(num_top: int | None, *values: float) -> tuple[TokenLogprob, ...]:
    """One log-probability per value, each with `num_top` alternatives; the k-th of those has -k."""
    if num_top is None:
        return ()
    top = tuple((token, -float(token)) for token in range(num_top))
    return tuple(TokenLogprob(value, top) for value in values)


@dataclass(eq=False)
class ScriptedEngine:
    """Answers every sequence with two tokens, unless the script says otherwise.

    Attributes:
        max_queue: sequences that may be open at once.
        max_length: most tokens of a prompt and its answer.
        answer: the text for a request; its first word is the first token, the rest the second.
        refusal: raised by `submit`.
        ending: finish reason and error of the last output.
        fail_at_once: end without the tokens before the last output.
        on_cancel: called with the digest by `unload(cancel=True)`; by default the requests that
            use it end.
        requests: every request that was accepted.
        most_running: the most requests that ever ran at once.
    """

    model: ServedModel = TINY
    max_queue: int = 1000
    max_length: int = 1_000_000
    answer: Callable[[Request], str] = lambda _: "one two"
    refusal: Exception | None = None
    ending: Ending = (FinishReason.STOP, None)
    fail_at_once: bool = False
    on_failure: Callable[[], None] = lambda: None
    on_cancel: Callable[[str], None] | None = None
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    def __post_init__(self) -> None:
        self.pool = AdapterPool(tiny.injection(), 4)
        self.constraints = Constraints(tiny.tokenizer(), frozenset({tiny.tokenizer().eos_token_id}))
        self.closed = False
        self._open: dict[str, Request] = {}
        self._ended: dict[str, Ending] = {}
        self._canceling: set[str] = set()  # adapters whose requests the pool is about to cancel

    # What a script decides ---------------------------------------------------------------------

    def pieces(self, request: Request, index: int) -> list[str]:
        """The texts of a sequence's tokens."""
        text = self.answer(request)
        first = text.split(" ")[0]
        return [first, text[len(first) :]]

    def tokens(self, request: Request, index: int) -> list[tuple[int, str]]:
        """The tokens of a sequence, each with its text."""
        if request.sampling.max_tokens == 0:
            return []
        return list(enumerate(self.pieces(request, index), FIRST_TOKEN))

    def last(self, request: Request) -> Ending:
        """How a sequence ends that nothing ended early."""
        return self.ending

    # Requests ----------------------------------------------------------------------------------

    async def check(self, constraint: Constraint) -> None:
        await self.constraints.check(constraint)

    def submit(self, request: Request) -> Outputs:
        if self.refusal is not None:
            raise self.refusal
        if self.closed:
            raise EngineStopped("the server is stopping and takes no new requests")
        length = len(request.prompt_ids)
        max_tokens = request.sampling.max_tokens
        if not 0 < length <= self.max_length - max_tokens:
            raise PromptTooLong(length, max_tokens, self.max_length)
        if self._num_open() + request.sampling.n > self.max_queue:
            raise QueueFull(self.max_queue, retry_after=1.0)
        self.requests.append(request)
        self._open[request.id] = request
        return self._outputs(request)

    def abort(self, request_id: str) -> None:
        if request_id in self._open:
            self._ended.setdefault(request_id, (FinishReason.ABORT, None))

    def stats(self) -> EngineStats:
        tasks = tuple(r.selection.task_digest for r in self.requests if r.selection.task_digest)
        return EngineStats(
            num_steps=len(self.requests),
            num_requests_running=self.running,
            resident=self.resident(),
            running_adapters=tasks,
            num_blocks=64,
            block_size=16,
        )

    async def warm_up(self) -> None:
        async with aclosing(self.submit(Request("warm-up", (FIRST_TOKEN,)))) as outputs:
            async for output in outputs:
                if output.error is not None:
                    raise EngineStopped(f"the first step failed: {output.error}")

    async def close(self) -> None:
        self.closed = True
        for request_id in list(self._open):
            self.abort(request_id)
        while self.running:
            await asyncio.sleep(0)
        await asyncio.to_thread(self.pool.close)
        self.constraints.close()

    async def _outputs(self, request: Request) -> Outputs:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        uses_adapters = False
        try:
            while not uses_adapters and self._early_ending(request) is None:
                await self._load(request)
                uses_adapters = self.pool.acquire(request.selection)
            for index in range(request.sampling.n):
                async for output in self._sequence(request, index):
                    yield output
        finally:
            self.running -= 1
            self._open.pop(request.id, None)
            self._ended.pop(request.id, None)
            if uses_adapters:
                self.pool.release(request.selection)

    async def _load(self, request: Request) -> None:
        await asyncio.sleep(0)
        for digest in request.selection:
            if digest is not None:
                await self.load(digest)

    async def _sequence(self, request: Request, index: int) -> Outputs:
        sampling = request.sampling
        tokens = self.tokens(request, index)
        output = RequestOutput(request.id, index)
        if index == 0:
            values = [-1.0] * (len(request.prompt_ids) - 1)
            prompt_logprobs = logprobs(sampling.prompt_logprobs, *values)
            output = replace(output, prompt_logprobs=prompt_logprobs)
        if not tokens:
            yield self._finished(output, self.last(request), 0)
        for position, (token_id, text) in enumerate(tokens):
            await asyncio.sleep(0)
            while self._canceling.intersection(request.selection):
                await asyncio.sleep(0)  # else it could end before the pool's thread cancels it
            early = self._early_ending(request)
            if early is not None:
                yield self._finished(output, early, position)
                return
            token = replace(
                output,
                token_ids=(token_id,),
                text=text,
                logprobs=logprobs(sampling.logprobs, -0.5 / 2**position),
            )
            if position == len(tokens) - 1:
                yield self._finished(token, self.last(request), len(tokens))
            elif not self.fail_at_once:
                yield token
            output = RequestOutput(request.id, index)

    def _finished(self, output: RequestOutput, ending: Ending, num_tokens: int) -> RequestOutput:
        finish_reason, error = ending
        return replace(
            output,
            finish_reason=finish_reason,
            error=error,
            completion_tokens=num_tokens,
            cached_tokens=1,
            timings=Timings(0.1, 0.2, 0.3),
        )

    def _early_ending(self, request: Request) -> Ending | None:
        if request.deadline is not None and time.monotonic() >= request.deadline:
            return FinishReason.ABORT, "deadline"
        return self._ended.get(request.id)

    def _num_open(self) -> int:
        return sum(request.sampling.n for request in self._open.values())

    # Adapters ----------------------------------------------------------------------------------

    def register(self, digest: str, loader: Loader, num_parameters: int) -> None:
        self.pool.register(digest, loader, num_parameters * 4)

    async def load(self, digest: str) -> None:
        await asyncio.to_thread(self.pool.load, digest)

    async def unload(self, digest: str, *, wait_s: float = 0.0, cancel: bool = False) -> None:
        abort = None
        if cancel:
            self._canceling.add(digest)
            loop = asyncio.get_running_loop()
            abort = partial(loop.call_soon_threadsafe, self._cancel, digest)
        try:
            await asyncio.to_thread(self.pool.unload, digest, wait_s=wait_s, abort=abort)
        finally:
            self._canceling.discard(digest)

    async def pin(self, digest: str) -> None:
        await asyncio.to_thread(self.pool.pin, digest)

    def unpin(self, digest: str) -> None:
        self.pool.unpin(digest)

    def resident(self) -> tuple[str, ...]:
        return self.pool.resident()

    def _cancel(self, digest: str) -> None:
        self._canceling.discard(digest)
        (self.on_cancel or self._cancel_users)(digest)

    def _cancel_users(self, digest: str) -> None:
        for request in self._open.values():
            if digest in request.selection:
                self._ended[request.id] = (FinishReason.ABORT, "unloaded")
