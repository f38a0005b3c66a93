"""From a validated body to the engine and back: resolve, encode, submit, collect. All generating routes go this way."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar

import fastapi
from fastapi import Depends

from crma.errors import CrmaError
from crma.prompts import raw_format
from crma.selection import BASE
from server import __version__
from server.engine.request import EngineError, FinishReason, Request, RequestOutput, SamplingParams
from server.errors import ClientGone, DeadlineExceeded, Draining, GenerationFailed, InvalidField, NotReady
from server.metrics import Metrics, RequestMetrics
from server.registry import Registry, Resolved
from server.schemas import Provenance, ServedModel, TimingsBody, Usage
from server.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from server.engine.async_engine import AsyncEngine

T = TypeVar("T")


class Prompt(NamedTuple):
    """Token ids, and the tokens that end an answer beside the model's own."""

    ids: tuple[int, ...]
    stop_ids: tuple[int, ...]


@dataclass
class SequenceResult:
    """One of n answers, as far as it has come; `last` is its last output, with the totals, once it has ended."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    last: RequestOutput | None = None


class Generation:
    """One request in the engine. `close` it whatever happens: it aborts what has not ended, and counts the request."""

    def __init__(self, engine: AsyncEngine, request: Request, resolved: Resolved, metrics: RequestMetrics) -> None:
        self.request = request
        self.resolved = resolved
        self.sequences = [SequenceResult() for _ in range(request.sampling.n)]
        self._engine = engine
        self._metrics = metrics
        self._failure = "abort"
        self._closed = False

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they come, already added to `sequences`.

        Raises:
            EngineError: refused; nothing has run.
            DeadlineExceeded, GenerationFailed, Draining: the engine gave up on the request.
        """
        try:
            stream = self._engine.submit(self.request)
            try:
                async for output in stream:
                    self._take(output)
                    yield output
            finally:
                if isinstance(stream, AsyncGenerator):  # now, and not when the garbage collector comes to it
                    await stream.aclose()
        except (EngineError, CrmaError):
            self._closed = True  # nothing to abort, and no request that ended
            raise

    async def finished(self) -> None:
        """Waits until every sequence has ended. Raises as `outputs`."""
        async with aclosing(self.outputs()) as outputs:
            async for _ in outputs:
                pass

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        ended = self._ended()
        if len(ended) < len(self.sequences):
            self._engine.abort(self.request.id)
            self._metrics.record(self._failure, None)
        else:
            self._metrics.record(str(ended[0].finish_reason), self.timings())

    def usage(self) -> Usage:
        """Tokens over all sequences; the prompt is counted once."""
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=sum(output.completion_tokens for output in self._ended()),
            cached_tokens=min(output.cached_tokens for output in self._ended()),
        )

    def timings(self) -> TimingsBody:
        """Of the whole request: the first sequence to start, the first token of any, the last to end."""
        times = [output.timings for output in self._ended() if output.timings is not None]
        first_tokens = [each.ttft_s for each in times if each.ttft_s is not None]
        return TimingsBody(
            queue_s=min(each.queue_s for each in times),
            ttft_s=min(first_tokens, default=None),
            e2e_s=max(each.e2e_s for each in times),
        )

    def _ended(self) -> list[RequestOutput]:
        return [sequence.last for sequence in self.sequences if sequence.last is not None]

    def _take(self, output: RequestOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            self._failure = "error"
            raise GenerationFailed(output.error or "the engine failed on this request")
        if output.finish_reason is FinishReason.ABORT:
            if output.error == "deadline":
                raise DeadlineExceeded("the request's deadline passed before it was done", field="timeout_s")
            raise Draining("the request was aborted: the server is stopping")
        sequence = self.sequences[output.index]
        sequence.text += output.text
        sequence.logprobs += output.logprobs
        if output.token_ids:
            self._metrics.tokens(output.index)
        if output.finish_reason is not None:
            sequence.last = output


class Frontend:
    """What every generating route needs. One per app, in `app.state.frontend`."""

    def __init__(
        self,
        settings: Settings,
        *,
        engine: AsyncEngine,
        registry: Registry,
        tokenizer: PreTrainedTokenizerBase,
        model: ServedModel,
        metrics: Metrics,
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.registry = registry
        self.model = model
        self.metrics = metrics
        self.draining = False
        self.ablation_slots = asyncio.Semaphore(settings.max_ablation_inflight)
        self._tokenizer = tokenizer
        self._raw = raw_format(tokenizer)
        # One thread: a fast tokenizer is not to be used by two at once, and encoding must not hold the event loop up.
        self._encoder = ThreadPoolExecutor(1, "encode")

    def resolve(self, task: str | None, crma: bool | None) -> Resolved:
        """The adapters of a request. Raises NotReady, Draining, and what the registry raises."""
        if self.draining:
            raise Draining("the server is stopping and takes no new requests")
        if not self.registry.verified:
            raise NotReady("the adapter store is not verified yet; try again", headers={"Retry-After": "1"})
        return self.registry.resolve(task, crma)

    async def encode(self, prompt: str, resolved: Resolved, *, raw: bool = False) -> Prompt:
        """A prompt's tokens, off the event loop. Raises InvalidField where the base has no chat template."""
        if not raw and resolved.prompt_format is None:
            message = "this model has no chat template: send raw prompts"
            raise InvalidField(message, field="raw", value=raw, allowed=True)
        head_and_tail = self._raw if raw or resolved.prompt_format is None else resolved.prompt_format
        ends = resolved.prompt_format or self._raw  # a prompt formatted by hand ends like one that was formatted here

        def encode() -> Prompt:
            return Prompt(tuple(head_and_tail.encode(self._tokenizer, prompt)), (ends.stop_id(self._tokenizer),))

        return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)

    def generation(
        self,
        prompt: Prompt,
        resolved: Resolved,
        sampling: SamplingParams,
        *,
        timeout_s: float | None = None,
        arrival: float | None = None,
        prefix: str = "gen",
    ) -> Generation:
        """A request, not yet submitted. A sampled one without a seed gets one, so that it can be repeated.

        Raises:
            InvalidField: n, stop or timeout_s over the server's limits.
        """
        self._check_limits(sampling, timeout_s)
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(31))
        arrival = time.monotonic() if arrival is None else arrival
        request = Request(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompt_ids=prompt.ids,
            stop_token_ids=prompt.stop_ids,
            sampling=sampling,
            selection=resolved.selection,
            arrival=arrival,
            deadline=arrival + (timeout_s or self.settings.request_timeout_s),
        )
        label = self.metrics.adapter_label(resolved.task.name if resolved.task else None)
        metrics = RequestMetrics(self.metrics, label, "on" if resolved.crma else "off")
        return Generation(self.engine, request, resolved, metrics)

    def provenance(self, generation: Generation) -> Provenance:
        """Exactly what answered."""
        selection = generation.request.selection
        return Provenance(
            base=self.model.digest,
            task=selection.task_digest,
            crma=selection.crma_digest,
            engine=__version__,
            dtype=self.model.dtype,
            seed=generation.request.sampling.seed,
        )

    def not_ready(self) -> str | None:
        """Why this server should get no requests yet, or any more; None if it should."""
        if self.draining:
            return "stopping"
        if not self.registry.verified:
            return "the adapter store is not verified yet"
        return None if self.engine.stats().num_steps else "no step has run yet"

    async def warm_up(self) -> None:
        """One token of the base model: the first step, before the first user pays for it."""
        base = Resolved(None, None, BASE, self._raw)
        request = Request(
            id=f"warm-up-{uuid.uuid4().hex}",
            prompt_ids=(await self.encode("Hello", base)).ids,
            sampling=SamplingParams(max_tokens=1),
            arrival=time.monotonic(),
        )
        async for output in self.engine.submit(request):
            if output.error:
                raise GenerationFailed(output.error)

    def close(self) -> None:
        """Ends the encoding thread."""
        self._encoder.shutdown(wait=False, cancel_futures=True)

    def _check_limits(self, sampling: SamplingParams, timeout_s: float | None) -> None:
        for name, value, limit in (
            ("n", sampling.n, self.settings.max_n),
            ("stop", len(sampling.stop), self.settings.max_stop),
            ("timeout_s", timeout_s or 0, self.settings.request_timeout_s),
        ):
            if value > limit:
                raise InvalidField(f"{name}: over this server's limit", field=name, value=value, allowed=f"<= {limit}")


async def unless_gone(request: fastapi.Request, work: Awaitable[T]) -> T:
    """`work`'s result; if the client goes away first, `work` is cancelled and ClientGone raised."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone("the client went away")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _frontend(request: fastapi.Request) -> Frontend:
    return request.app.state.frontend


TheFrontend = Annotated[Frontend, Depends(_frontend)]
