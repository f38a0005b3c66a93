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
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import fastapi
from fastapi import Depends

from crma.errors import StoreError
from crma.prompts import raw_format
from crma.selection import BASE
from server import __version__
from server.engine.request import EngineError, FinishReason, Request, RequestOutput, SamplingParams, Timings
from server.errors import ClientGone, DeadlineExceeded, Draining, GenerationFailed, InvalidField, NotReady
from server.metrics import Metrics, RequestMetrics
from server.registry import Registry, Resolved
from server.schemas import ServedModel
from server.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from server.engine.async_engine import AsyncEngine

T = TypeVar("T")


@dataclass
class SequenceResult:
    """One of n answers, as far as it has come; `last` is its last output, with the totals, once it has ended."""

    text: str = ""
    logprobs: list[float] = field(default_factory=list)
    last: RequestOutput | None = None


class Generation:
    """One request in the engine. `close` it whatever happens: it aborts what has not ended, and counts the request."""

    def __init__(self, engine: AsyncEngine, request: Request, metrics: RequestMetrics) -> None:
        self.request = request
        self.sequences = [SequenceResult() for _ in range(request.sampling.n)]
        self._engine = engine
        self._metrics = metrics
        self._failure = "abort"
        self._open = False  # taken by the engine, and neither ended nor refused

    async def outputs(self) -> AsyncGenerator[RequestOutput, None]:
        """Outputs as they come, already added to `sequences`.

        Raises:
            EngineError, StoreError: refused; nothing has run, and it may be tried again.
            DeadlineExceeded, GenerationFailed, Draining: the engine gave up on the request.
        """
        stream = self._engine.submit(self.request)
        self._open = True
        async with aclosing(stream):  # type: ignore[type-var]  # now, and not when the garbage collector comes to it
            try:
                async for output in stream:
                    self._take(output)
                    yield output
            except (EngineError, StoreError):
                self._open = False
                raise

    async def finished(self) -> None:
        """Waits until every sequence has ended. Raises as `outputs`."""
        async with aclosing(self.outputs()) as outputs:
            async for _ in outputs:
                pass

    def close(self) -> None:
        """Idempotent."""
        if not self._open:
            return
        self._open = False
        ended = self._ended()
        if len(ended) < len(self.sequences):
            self._engine.abort(self.request.id)
            self._metrics.record(self._failure, None)
        else:
            self._metrics.record(str(ended[0].finish_reason), self.timings())

    def usage(self) -> dict[str, int]:
        """Tokens over all sequences; the prompt is counted once."""
        return {
            "prompt_tokens": len(self.request.prompt_ids),
            "completion_tokens": sum(output.completion_tokens for output in self._ended()),
            "cached_tokens": min(output.cached_tokens for output in self._ended()),
        }

    def timings(self) -> Timings:
        """Of the whole request: the first sequence to start, the first token of any, the last to end."""
        times = [output.timings for output in self._ended() if output.timings is not None]
        first_token = min((each.ttft_s for each in times if each.ttft_s is not None), default=None)
        return Timings(min(each.queue_s for each in times), first_token, max(each.e2e_s for each in times))

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


@dataclass(eq=False)
class Frontend:
    """What every generating route needs. One per app, in `app.state.frontend`.

    Args:
        engine: running already.
        registry: not started; the app starts and stops it.
        tokenizer: its own; not one that another thread uses.
        model: what the engine runs.
        metrics: the one that `registry` was given.
    """

    settings: Settings
    engine: AsyncEngine
    registry: Registry
    tokenizer: PreTrainedTokenizerBase
    model: ServedModel
    metrics: Metrics
    draining: bool = False

    def __post_init__(self) -> None:
        self.ablation_slots = asyncio.Semaphore(self.settings.max_ablation_inflight)
        self._raw = raw_format(self.tokenizer)
        # One thread: a fast tokenizer is not to be used by two at once, and encoding must not hold the event loop up.
        self._encoder = ThreadPoolExecutor(1, "encode")

    def resolve(self, task: str | None, crma: bool | None) -> Resolved:
        """The adapters of a request. Raises NotReady, Draining, and what the registry raises."""
        if self.draining:
            raise Draining("the server is stopping and takes no new requests")
        if not self.registry.verified:
            raise NotReady("the adapter store is not verified yet; try again")
        return self.registry.resolve(task, crma)

    async def generation(
        self,
        prompt: str,
        resolved: Resolved,
        sampling: SamplingParams,
        *,
        raw: bool = False,
        timeout_s: float | None = None,
        prefix: str = "gen",
    ) -> Generation:
        """A request, not yet submitted. A sampled one without a seed gets one, so that it can be repeated.

        Raises:
            InvalidField: n, stop or timeout_s over the server's limits; or not raw, where the base has no chat format.
        """
        arrival = time.monotonic()
        for name, value, limit in (
            ("n", sampling.n, self.settings.max_n),
            ("stop", len(sampling.stop), self.settings.max_stop),
            ("timeout_s", timeout_s or 0, self.settings.request_timeout_s),
        ):
            if value > limit:
                raise InvalidField(f"{name}: over this server's limit", field=name, value=value, allowed=f"<= {limit}")
        if not raw and resolved.prompt_format is None:
            message = "this model has no chat template: send raw prompts"
            raise InvalidField(message, field="raw", value=raw, allowed=True)
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(31))
        own = resolved.prompt_format or self._raw  # a prompt formatted by hand ends like one that was formatted here

        def encode() -> tuple[list[int], int]:
            return (self._raw if raw else own).encode(self.tokenizer, prompt), own.stop_id(self.tokenizer)

        prompt_ids, stop_id = await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
        request = Request(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompt_ids=tuple(prompt_ids),
            stop_token_ids=(stop_id,),
            sampling=sampling,
            selection=resolved.selection,
            arrival=arrival,
            deadline=arrival + (timeout_s or self.settings.request_timeout_s),
        )
        label = self.metrics.adapter_label(resolved.task.name if resolved.task else None)
        crma = "off" if resolved.selection.crma_digest is None else "on"
        return Generation(self.engine, request, RequestMetrics(self.metrics, label, crma))

    def provenance(self, seed: int | None, crma: str | None, **tasks: Any) -> dict[str, Any]:
        """Exactly what answered: `tasks` is the digest, or the digests by name, of the task adapters."""
        served = {"crma": crma, "engine": __version__, "dtype": self.model.dtype, "seed": seed}
        return {"base": self.model.digest, **tasks, **served}

    def not_ready(self) -> str | None:
        """Why this server should get no requests yet, or any more; None if it should."""
        if self.draining:
            return "stopping"
        if not self.registry.verified:
            return "the adapter store is not verified yet"
        stats = self.engine.stats()
        if stats.has_failed:
            return "the engine has failed; restart the server"
        return None if stats.num_steps else "no step has run yet"

    async def warm_up(self) -> None:
        """One token of the base model: the first step, before the first user pays for it."""
        generation = await self.generation("Hello", Resolved(None, BASE, None), SamplingParams(1), raw=True)
        await generation.finished()

    def close(self) -> None:
        """Ends the encoding thread."""
        self._encoder.shutdown(wait=False, cancel_futures=True)


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
