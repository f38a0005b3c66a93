"""vLLM behind the seam: requests wait here for their adapters, and run in vLLM's processes."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterable
from contextlib import ExitStack, aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase
from vllm.exceptions import VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from crma.core.errors import CrmaError
from crma.core.selection import BASE, AdapterSelection
from server.engine.errors import EngineStopped, UnsupportedRequest
from server.engine.inference_engine import Outputs, ServedModel
from server.engine.native.constraint import Constraints
from server.engine.native.output import STEP_FAILED
from server.engine.native.pooled_engine import PooledEngine
from server.engine.request import (
    Constraint,
    EngineStats,
    FinishReason,
    Request,
)
from server.engine.room import check_length
from server.engine.vllm.adapter_pool import HostAdapterPool
from server.engine.vllm.answer import Answer
from server.engine.vllm.request_queue import Limits, check_room, waiting
from server.engine.vllm.sampling import check_sampling, vllm_sampling
from server.engine.vllm.selections import Selections
from server.engine.vllm.self_check import check_rows
from server.engine.vllm.step_stats import StepStats
from server.engine.vllm.stream import Stream

logger = logging.getLogger(__name__)

FAILED = "the engine failed"


class VllmEngine(PooledEngine):
    """The `InferenceEngine` on vLLM's `AsyncLLM`.

    It hands vLLM as many sequences as run at once, with adapters that are loaded. The others wait
    here: interactive ones go first, then those of owners who run least, then the oldest.

    Args:
        llm: vLLM, started.
        model: what it runs.
        tokenizer: a fast one, of this object alone.
        model_end_ids: tokens that end every sequence.
        pool: the adapters in this process.
        selections: those in vLLM.
        stats: what vLLM says of its steps.
        limits: of requests and selections.
        resources: closed after all else.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        model: ServedModel,
        tokenizer: PreTrainedTokenizerBase,
        model_end_ids: frozenset[int],
        pool: HostAdapterPool,
        selections: Selections,
        stats: StepStats,
        limits: Limits,
        resources: ExitStack,
    ) -> None:
        super().__init__(model, pool)
        self.limits = limits
        self._llm = llm
        self._tokenizer = tokenizer
        self._model_end_ids = model_end_ids
        self._selections = selections
        self._steps = stats
        self._resources = resources
        self._constraints = Constraints(tokenizer, model_end_ids)
        self._streams: dict[str, Stream] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._failure: str | None = None
        self._is_closed = False
        self._is_checked = False  # until then no step counts: the server is not ready
        pool.on_change = self._pool_has_changed

    # Requests ----------------------------------------------------------------------------------

    async def check(self, constraint: Constraint) -> None:
        """Compile a constraint as the native engine would. See `InferenceEngine.check`."""
        self._check_open()
        await self._constraints.check(constraint)

    def submit(self, request: Request) -> Outputs:
        """Queue a request; its outputs follow. See `InferenceEngine.submit`."""
        self._loop = asyncio.get_running_loop()
        self._check_open()
        check_sampling(request.sampling)
        check_length(request.prompt_ids, request.sampling.max_tokens, self.model.max_model_len)
        check_room(self._streams.values(), request, self.limits)
        answers = [self._answer(request, index) for index in range(request.sampling.n)]
        stream = Stream(request, answers)
        self._streams[request.id] = stream
        if request.deadline is not None:
            left = max(0.0, request.deadline - time.monotonic())
            expire = partial(self._end, stream, FinishReason.ABORT, "deadline")
            stream.timer = self._loop.call_later(left, expire)
        self._begin_waiting()
        return self._outputs(stream)

    def abort(self, request_id: str) -> None:
        """End a request at once; its stream ends with finish_reason abort."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._end(stream, FinishReason.ABORT)

    def stats(self) -> EngineStats:
        """The state now; KV cache and counters are those of the last step."""
        if self._llm.errored and not self._is_closed:
            self._fail("vLLM has ended")
        streams = list(self._streams.values())
        begun = [stream for stream in streams if stream.has_begun]
        num_waiting = min(self._steps.num_waiting, len(begun))  # in vLLM, for blocks or slots
        cache = self._llm.vllm_config.cache_config
        counters = self._steps.counters
        if not self._is_checked:
            counters = replace(counters, num_steps=0)
        return EngineStats(
            **asdict(counters),
            **asdict(self.pool.counters),
            has_failed=self._failure is not None,
            failure=self._failure or "",
            num_requests_running=len(begun) - num_waiting,
            num_requests_waiting=len(streams) - len(begun) + num_waiting,
            kv_cache_usage=self._steps.kv_cache_usage,
            adapter_uses=self.pool.num_users(),
            resident=self.pool.resident(),
            running_adapters=_task_digests(begun),
            waiting_adapters=_task_digests([s for s in streams if not s.has_begun]),
            num_blocks=cache.num_gpu_blocks or 0,
            block_size=cache.block_size or 0,
        )

    async def warm_up(self) -> None:
        """Run the first steps, and check that no request gets another's adapters.

        Raises:
            EngineStopped: a step failed, or the check did.
        """
        await check_rows(self, self.pool.injection, self.limits.max_loras)
        self._is_checked = True

    async def close(self) -> None:
        """Take nothing new, abort what has not finished, and end vLLM's processes."""
        self._is_closed = True
        tasks = [task for stream in self._streams.values() for task in stream.tasks]
        for stream in list(self._streams.values()):
            self._end(stream, FinishReason.ABORT)
        await asyncio.gather(*tasks, *self._background, return_exceptions=True)
        await asyncio.to_thread(self._llm.shutdown)
        await asyncio.to_thread(self.pool.close)
        self._constraints.close()
        await asyncio.to_thread(self._resources.close)

    # Adapters ----------------------------------------------------------------------------------

    async def unload(self, digest: str, *, wait_s: float = 0.0, cancel: bool = False) -> None:
        """Free a resident adapter, here and in vLLM. See `InferenceEngine.unload`."""
        await super().unload(digest, wait_s=wait_s, cancel=cancel)
        await self._selections.drop_gone()

    def _abort_adapter(self, digest: str) -> None:
        self._call(partial(self._end_users, digest))

    # What is refused ---------------------------------------------------------------------------

    def _check_open(self) -> None:
        """Raises EngineStopped if the engine takes no new requests."""
        if self._failure is not None:
            raise EngineStopped("the engine has failed and takes no new requests")
        if self._is_closed:
            raise EngineStopped("the server is stopping and takes no new requests")

    # On the event loop -------------------------------------------------------------------------

    def _answer(self, request: Request, index: int) -> Answer:
        return Answer(request, index, self._tokenizer, self._model_end_ids)

    async def _outputs(self, stream: Stream) -> Outputs:
        async with aclosing(stream.outputs()) as outputs:
            try:
                async for output in outputs:
                    yield output
            finally:
                self._end(stream, FinishReason.ABORT)

    def _begin_waiting(self) -> None:
        """Hand vLLM the requests that may run now, and load the adapters of the others."""
        for digest, cause in self.pool.take_failures().items():
            for stream in waiting(self._streams.values()):
                if digest in stream.request.selection:
                    self._end(stream, FinishReason.ERROR, str(cause), cause)
        in_order = waiting(self._streams.values())
        self.pool.prefetch(stream.request.selection for stream in in_order)
        num_running = sum(s.num_open for s in self._streams.values() if s.has_begun)
        for stream in in_order:
            selection = stream.request.selection
            room = self.limits.max_num_seqs - num_running
            if num_running and len(stream.answers) > room:
                break
            if self.pool.acquire(selection):
                num_running += len(stream.answers)
                self._begin(stream)
            elif not self.pool.is_loading(selection):
                break  # it waits for room, which those behind it would take

    def _begin(self, stream: Stream) -> None:
        stream.has_begun = True
        running = [asyncio.ensure_future(self._run(stream, answer)) for answer in stream.answers]
        stream.tasks.extend(running)
        num_left = len(running)

        def release(_: asyncio.Task[None]) -> None:
            nonlocal num_left
            num_left -= 1
            if not num_left:
                self.pool.release(stream.request.selection)
                self._begin_waiting()

        for task in running:
            task.add_done_callback(release)

    async def _run(self, stream: Stream, answer: Answer) -> None:
        """Run one sequence in vLLM, and hand out what it says."""
        try:
            await self._generate(stream, answer)
        except EngineDeadError:
            self._fail("vLLM has ended")
        except VLLMClientError as error:  # what `check_sampling` does not know
            refusal = UnsupportedRequest(f"vLLM refuses this request: {error}")
            stream.end_answer(answer, FinishReason.ERROR, str(refusal), refusal)
        except CrmaError as error:
            stream.end_answer(answer, FinishReason.ERROR, str(error), error)
        except Exception:
            logger.exception("request %s failed in vLLM", stream.request.id)
            stream.end_answer(answer, FinishReason.ERROR, STEP_FAILED)
        if not stream.num_open:
            self._forget(stream)

    async def _generate(self, stream: Stream, answer: Answer) -> None:
        request = stream.request
        selection = request.selection
        lora = await self._lora(selection)
        prompt = tokens_input(list(request.prompt_ids), cache_salt=request.cache_salt or None)
        try:
            outputs = self._llm.generate(
                prompt,
                vllm_sampling(request, answer.index, answer.end_ids),
                f"{request.id}#{answer.index}",
                lora_request=lora,
                priority=0 if request.interactive else 1,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    ours = answer.take(output)
                    self._steps.counters.generation_tokens += len(ours.token_ids)
                    stream.put(ours)
                    if answer.is_finished:
                        return
        finally:
            if selection != BASE:
                self._selections.release(selection)

    async def _lora(self, selection: AdapterSelection) -> LoRARequest | None:
        """vLLM's LoRA for a selection, in use; None for the base model."""
        if selection == BASE:
            return None
        while True:
            lora = self._selections.use(selection)
            if lora is not None:
                return lora
            # Shielded: vLLM must not be left with a half-loaded selection.
            await asyncio.shield(self._in_background(self._selections.load(selection)))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _end(
        self,
        stream: Stream,
        reason: FinishReason,
        error: str | None = None,
        cause: Exception | None = None,
    ) -> None:
        """End what is open of a request."""
        stream.end(reason, error, cause)
        self._forget(stream)

    def _forget(self, stream: Stream) -> None:
        """Count a request no more: nothing of it is open."""
        stream.close()
        if self._streams.get(stream.request.id) is stream:
            del self._streams[stream.request.id]

    def _end_users(self, digest: str) -> None:
        """End the requests that run with an adapter."""
        for stream in list(self._streams.values()):
            if stream.has_begun and digest in stream.request.selection:
                self._end(stream, FinishReason.ABORT, "unloaded")

    # From other threads ------------------------------------------------------------------------

    def _pool_has_changed(self) -> None:
        """A load or an unload has ended."""
        self._call(self._take_pool_change)

    def _take_pool_change(self) -> None:
        if not self._is_closed:
            self._begin_waiting()
            self._in_background(self._selections.drop_gone())

    def _fail(self, reason: str) -> None:
        """End every request with an error, and the server."""
        if self._failure is not None or self._is_closed:
            return
        logger.error("the engine has failed and takes no more requests: %s", reason)
        self._failure = reason
        self._call(self._end_all_failed)
        self.on_failure()

    def _end_all_failed(self) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, FinishReason.ERROR, FAILED)


def _task_digests(streams: Iterable[Stream]) -> tuple[str, ...]:
    """Digests of the task adapters that requests select, sorted."""
    digests = {stream.request.selection.task_digest for stream in streams}
    return tuple(sorted(digest for digest in digests if digest is not None))
