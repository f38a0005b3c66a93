"""From a validated body to the engine and back: resolve, encode, submit, collect. All generating routes go this way."""

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, TypeVar

import fastapi
from fastapi import Depends
from transformers import PreTrainedTokenizerBase

from crma.errors import StoreError
from crma.prompts import PromptFormat, Turn, encode_chat, encode_text, raw_format
from crma.selection import BASE
from server import __version__, errors
from server.engine.async_engine import AsyncEngine
from server.engine.errors import EngineError, QueueFull
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams, Timings, TokenLogprob
from server.jobs import Jobs
from server.metrics import Labels, Metrics
from server.question_sets import QuestionSets
from server.registry import Registry, Resolved
from server.schemas import ServedModel
from server.settings import Settings

T = TypeVar("T")
Outputs = AsyncGenerator[RequestOutput, None]
Prompt = str | Sequence[int] | Sequence[Turn]


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

    def __init__(self, engine: AsyncEngine, request: Request, metrics: Metrics, labels: Labels) -> None:
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
                self._metrics.ended(self._labels, str(self.sequences[0].last.finish_reason), self.timings())
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
        new, cached = sum(each.completion_tokens for each in ended), min(each.cached_tokens for each in ended)
        return {"prompt_tokens": len(self.request.prompt_ids), "completion_tokens": new, "cached_tokens": cached}

    def timings(self) -> Timings:
        """Of the whole request: the first sequence to start, the first token of any, the last to end."""
        times = [sequence.last.timings for sequence in self.sequences if sequence.last.timings is not None]
        first_token = min((each.ttft_s for each in times if each.ttft_s is not None), default=None)
        return Timings(min(each.queue_s for each in times), first_token, max(each.e2e_s for each in times))

    def _take(self, output: RequestOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            raise errors.GenerationFailed(output.error or "the engine failed on this request")
        if output.finish_reason is FinishReason.ABORT:
            if output.error == "deadline":
                raise errors.DeadlineExceeded("the request's deadline passed before it was done", field="timeout_s")
            if output.error == "unloaded":
                raise errors.AdapterUnloaded("its adapter was unloaded by an administrator", field="task")
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
        kept = self.settings.evaluations
        self.ablation_jobs = Jobs(kept / "ablations", self.settings.max_ablation_jobs, self.settings.max_ablation_kept)
        self.question_sets = QuestionSets(self.settings.store / "question_sets", kept / "question_sets")
        self._raw = raw_format(self.tokenizer)
        # One thread: a fast tokenizer is not to be used by two at once, and encoding must not hold the event loop up.
        self._encoder = ThreadPoolExecutor(1, "encode")
        self._encoding = asyncio.Semaphore(self.settings.max_queue + 1)  # one there, and those that wait for it
        self._num_tokens = len(self.tokenizer)

    def resolve(self, task: str | None, crma: bool | None, crma_version: str | None = None) -> Resolved:
        """The adapters of a request. Raises NotReady, Draining, and what the registry raises."""
        if self.draining:
            raise errors.Draining("the server is stopping and takes no new requests")
        if not self.registry.verified:
            raise errors.NotReady("the adapter store is not verified yet; try again")
        return self.registry.resolve(task, crma, crma_version)

    def check(
        self, resolved: Resolved, sampling: SamplingParams, timeout_s: float | None, *, needs_format: bool
    ) -> None:
        """InvalidField for n, stop or timeout_s over the server's limits, or a format that there is not."""
        for name, value, limit in (
            ("n", sampling.n, self.settings.max_n),
            ("stop", len(sampling.stop), self.settings.max_stop),
            ("timeout_s", timeout_s or 0, self.settings.request_timeout_s),
        ):
            if value > limit:
                raise errors.InvalidField(f"{name}: over the limit", field=name, value=value, allowed=f"<= {limit}")
        if needs_format and resolved.prompt_format is None:
            message = "this model has no chat template: send raw prompts"
            raise errors.InvalidField(message, field="raw", value=False, allowed=True)

    async def generation(
        self,
        prompt: Prompt,
        resolved: Resolved,
        sampling: SamplingParams,
        *,
        raw: bool = False,
        timeout_s: float | None = None,
        prefix: str = "gen",
        answer: str | None = None,
        interactive: bool = True,
    ) -> Generation:
        """A request, not yet submitted. A sampled one without a seed gets one, so that it can be repeated.

        Args:
            prompt: text; or what needs no format: token ids, or the turns of a conversation (the chat template).
            answer: a given one, of whose tokens (`prompt_logprobs`) log-probabilities are wanted.

        Raises:
            InvalidField: as `check`; or a token id that there is not.
            ConfigError: the chat template refuses these turns.
            QueueFull: `max_queue` prompts wait to be encoded.
        """
        arrival = time.monotonic()
        self.check(resolved, sampling, timeout_s, needs_format=isinstance(prompt, str) and not raw)
        if sampling.temperature > 0 and sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(31))
        prompt_ids, answer_ids, stop_id = await self._encode(prompt, resolved.prompt_format or self._raw, raw, answer)
        if answer is not None:
            sampling = replace(sampling, prompt_logprobs=0, prompt_logprobs_from=len(prompt_ids))
        request = Request(
            id=f"{prefix}-{uuid.uuid4().hex}",
            prompt_ids=prompt_ids + answer_ids,
            stop_token_ids=(stop_id,),
            sampling=sampling,
            selection=resolved.selection,
            arrival=arrival,
            deadline=arrival + (timeout_s or self.settings.request_timeout_s),
            interactive=interactive,
        )
        label = self.metrics.adapter_label(resolved.task.name if resolved.task else None)
        crma = "off" if resolved.selection.crma_digest is None else "on"
        return Generation(self.engine, request, self.metrics, (label, crma))

    async def _encode(
        self, prompt: Prompt, own: PromptFormat, raw: bool, answer: str | None
    ) -> tuple[tuple[int, ...], tuple[int, ...], int]:
        """Ids of the prompt and of a given answer, and the token that ends one, also of a prompt formatted by hand."""
        for at, each in enumerate(() if isinstance(prompt, str) else prompt):
            if isinstance(each, int) and not 0 <= each < self._num_tokens:
                name, allowed = f"prompt.{at}", f"0 to {self._num_tokens - 1}"
                raise errors.InvalidField(f"{name}: no such token", field=name, value=each, allowed=allowed)
        if self._encoding.locked():
            raise QueueFull(self.settings.max_queue, retry_after=1.0)

        def encode() -> tuple[tuple[int, ...], tuple[int, ...], int]:
            if isinstance(prompt, str):
                ids: Sequence[Any] = (self._raw if raw else own).encode(self.tokenizer, prompt)
            else:
                turns = [each for each in prompt if isinstance(each, Turn)]
                ids = encode_chat(self.tokenizer, turns) if turns else prompt
            given = () if answer is None else encode_text(self.tokenizer, answer)
            return tuple(ids), tuple(given), own.stop_id(self.tokenizer)

        async with self._encoding:
            return await asyncio.get_running_loop().run_in_executor(self._encoder, encode)

    def text(self, ids: Sequence[int]) -> str:
        """Of tokens, special ones too; part of a character is shown as �."""
        # Decoding only reads the tokenizer; it need not wait for the thread that encodes.
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def top_tokens(self, logprob: TokenLogprob) -> list[dict[str, Any]]:
        """The most probable tokens as they are answered, each with its own text."""
        return [{"id": each, "token": self.text([each]), "logprob": value} for each, value in logprob.top]

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
        """One token of the base model: the first step, before the first user pays for it; no metric counts it."""
        generation = await self.generation("Hello", Resolved(None, BASE, None), SamplingParams(1), raw=True)
        async for _ in self.engine.submit(generation.request):
            pass

    def close(self) -> None:
        """Ends the encoding thread."""
        self._encoder.shutdown(wait=False, cancel_futures=True)


async def all_of(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results; the first to fail cancels, and so aborts, the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


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
        raise errors.ClientGone("the client went away")
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _frontend(request: fastapi.Request) -> Frontend:
    return request.app.state.frontend


TheFrontend = Annotated[Frontend, Depends(_frontend)]
