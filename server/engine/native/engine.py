"""The engine: a step is schedule, run, update. One thread; everything else goes round it."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from server.engine.native.batch import Batch, build_batch
from server.engine.native.detokenizer import Detokenizer
from server.engine.native.model_runner import ModelRunner
from server.engine.native.sampler import SamplingRow, sample, token_logprobs
from server.engine.native.scheduler import Admission, Scheduler, Step
from server.engine.native.sequence import Sequence
from server.engine.request import (
    EngineCounters,
    FinishReason,
    Request,
    RequestOutput,
    Timings,
    TokenLogprob,
)

logger = logging.getLogger(__name__)

MAX_OVERTAKEN = (
    64  # sequences may start before one whose adapter finds no room; then it is its turn
)
PREFETCH = 64  # waiting sequences whose adapters are loaded ahead


@dataclass
class Engine:
    """Sequences in, outputs out.

    Args:
        stop_ids: tokens that end every sequence (the model's own).
        max_model_len: prompt and answer together, in tokens; it fits the KV cache.
    """

    runner: ModelRunner
    scheduler: Scheduler
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    max_model_len: int
    clock: Callable[[], float] = time.monotonic
    counters: EngineCounters = field(default_factory=EngineCounters)

    def __post_init__(self) -> None:
        self.pool = self.runner.pool
        assert (
            self.scheduler.blocks.blocks_for(self.max_model_len) <= self.scheduler.blocks.capacity
        )

    def add(self, request: Request) -> None:
        """Queue the n sequences of a request of at most max_model_len tokens."""
        seed = request.sampling.seed
        for index in range(request.sampling.n):
            sequence, generator = Sequence(request, index), torch.Generator()
            generator.manual_seed(generator.seed() if seed is None else seed + index)
            sequence.decoding = Detokenizer(self.tokenizer, request.sampling.stop), generator
            self.scheduler.add(sequence)

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End every sequence of a request; its blocks are free for the next step."""
        return [
            self._finish(s, FinishReason.ABORT)
            for s in self.scheduler.unfinished()
            if s.request.id == request_id
        ]

    def abort_adapter(self, digest: str) -> list[RequestOutput]:
        """End every sequence that runs with an adapter."""
        using = [s for s in self.scheduler.running if digest in s.request.selection]
        return [self._finish(s, FinishReason.ABORT, error="unloaded") for s in using]

    def step(self) -> list[RequestOutput]:
        """Schedule, run, update. A failed forward pass ends the sequences that were in it, and nothing else."""
        ended = self._expire() + self._end_unloadable()
        # In the order in which they start: room that an earlier ablation item kept would not be an interactive one's.
        first = sorted(self.scheduler.waiting, key=lambda s: not s.request.interactive)
        self.pool.prefetch([s.request.selection for s in islice(first, PREFETCH)])
        step = self.scheduler.schedule(self._admit)
        self._count(step)
        if not step.chunks:
            return ended
        batch = build_batch(step, self.runner.kv)
        try:
            logits = self.runner.run(batch, step.new_blocks)
        except Exception:
            logger.exception("a step failed; its %d sequences end with an error", len(step.chunks))
            return ended + [
                self._finish(c.sequence, FinishReason.ERROR, error="the step failed")
                for c in step.chunks
            ]
        self.scheduler.computed(step)
        return ended + self._update(batch, logits)

    def seconds_left(self) -> float | None:
        """Until the next deadline; None if nothing has one."""
        deadlines = [
            s.request.deadline
            for s in self.scheduler.unfinished()
            if s.request.deadline is not None
        ]
        return max(0.0, min(deadlines) - self.clock()) if deadlines else None

    def check_integrity(self) -> None:
        """AssertionError where the books do not balance."""
        self.scheduler.check_integrity()
        self.pool.check_integrity()
        pins = sum(
            digest is not None for s in self.scheduler.running for digest in s.request.selection
        )
        assert self.pool.num_users() == pins

    def _admit(self, sequence: Sequence) -> Admission:
        selection = sequence.request.selection
        if self.pool.acquire(selection):
            return Admission.NOW
        if sequence.num_overtaken >= MAX_OVERTAKEN and not self.pool.is_loading(selection):
            return (
                Admission.HOLD
            )  # so that whoever runs lets go of an adapter, and this one finds room
        return Admission.LATER

    def _expire(self) -> list[RequestOutput]:
        now = self.clock()
        late = [
            s
            for s in self.scheduler.unfinished()
            if s.request.deadline is not None and now >= s.request.deadline
        ]
        return [self._finish(s, FinishReason.ABORT, error="deadline") for s in late]

    def _end_unloadable(self) -> list[RequestOutput]:
        """Whoever waits for an adapter that can't be loaded gets the reason."""
        return [
            self._finish(s, FinishReason.ERROR, error=cause)
            for digest, cause in self.pool.take_failures().items()
            for s in list(self.scheduler.waiting)
            if digest in s.request.selection
        ]

    def _count(self, step: Step) -> None:
        """Pins and clocks of who starts and who gives way."""
        now = self.clock()
        for sequence in step.preempted:
            self.pool.release(sequence.request.selection)
        self.counters.num_preemptions += len(step.preempted)
        self.counters.num_steps += bool(step.chunks)
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.first_scheduled is None:
                sequence.first_scheduled = now
                self.counters.prompt_tokens += len(sequence.request.prompt_ids)
                if self.scheduler.root_of is not None:
                    self.counters.prefix_cache_queries += len(sequence.request.prompt_ids)
                    self.counters.prefix_cache_hits += chunk.start

    def _update(self, batch: Batch, logits: torch.Tensor) -> list[RequestOutput]:
        """Logits -> the next token of every chunk that ends at its sequence's newest token."""
        are_numbers = (
            logits.amax(-1).isfinite().tolist()
        )  # a NaN or +inf is the largest; the sampler may not meet them
        rows, sequences, broken = [], [], []
        first = 0
        for chunk, count in zip(batch.chunks, batch.num_logits, strict=True):
            part = slice(first, first := first + count)
            if not all(are_numbers[part]):
                broken.append(chunk.sequence)
                continue
            if chunk.sequence.wants_prompt_logprobs:
                self._add_prompt_logprobs(chunk.sequence, chunk.stop - count, logits[part])
            if chunk.samples:
                rows.append(first - 1)
                sequences.append(chunk.sequence)
        outputs = self._sample(logits[rows], sequences) if rows else []
        if broken:
            logger.error(
                "%d sequences end with an error: their logits are not numbers", len(broken)
            )
        error = "the model and adapters overflow on this prompt"
        return outputs + [self._finish(s, FinishReason.ERROR, error=error) for s in broken]

    def _sample(self, logits: torch.Tensor, sequences: list[Sequence]) -> list[RequestOutput]:
        """Each sequence gets its next token and, where asked for, its log-probability."""
        now = self.clock()
        rows = [
            SamplingRow(s.request.sampling, s.request.prompt_ids, s.output_ids, s.decoding[1])
            for s in sequences
        ]
        tokens = sample(logits, rows)
        logprobs: list[tuple[TokenLogprob, ...]] = [()] * len(tokens)
        if asked := [i for i, s in enumerate(sequences) if s.request.sampling.logprobs is not None]:
            tops = [sequences[i].request.sampling.logprobs or 0 for i in asked]
            for i, logprob in zip(
                asked, token_logprobs(logits[asked], [tokens[i] for i in asked], tops), strict=True
            ):
                logprobs[i] = (logprob,)
        return [self._append(*each, now) for each in zip(sequences, tokens, logprobs, strict=True)]

    def _add_prompt_logprobs(self, sequence: Sequence, start: int, logits: torch.Tensor) -> None:
        """The logits at a position are of the token after it; those of the prompt's last are not of the prompt."""
        # What is there of them already is computed again after it had to give way.
        del sequence.prompt_logprobs[
            max(0, start + 1 - sequence.request.sampling.prompt_logprobs_from) :
        ]
        targets = sequence.request.prompt_ids[start + 1 : start + 1 + len(logits)]
        top = sequence.request.sampling.prompt_logprobs or 0
        sequence.prompt_logprobs += token_logprobs(
            logits[: len(targets)], targets, [top] * len(targets)
        )

    def _append(
        self, sequence: Sequence, token: int, logprob: tuple[TokenLogprob, ...], now: float
    ) -> RequestOutput:
        """Give a sequence its next token, and end it where that ends it."""
        request = sequence.request
        sequence.first_token = sequence.first_token or now
        is_end = token in self.stop_ids or token in request.stop_token_ids
        if is_end and not request.sampling.ignore_eos:
            return self._finish(sequence, FinishReason.STOP)
        sequence.token_ids.append(token)
        self.counters.generation_tokens += 1
        detokenizer, _ = sequence.decoding
        new = _output(sequence, (token,), detokenizer.add(token), logprob)
        if detokenizer.stopped:
            return self._finish(sequence, FinishReason.STOP, new)
        if len(sequence.token_ids) - len(request.prompt_ids) >= request.sampling.max_tokens:
            return self._finish(sequence, FinishReason.LENGTH, new)
        return new

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        new: RequestOutput | None = None,
        error: str | Exception = "",
    ) -> RequestOutput:
        """Take a sequence out. Its last output is what is `new`, with what was held back, the totals and the error."""
        request, new = sequence.request, new or _output(sequence)
        if self.scheduler.remove(sequence):
            self.pool.release(request.selection)
        now = self.clock()
        ttft_s = None if sequence.first_token is None else sequence.first_token - request.arrival
        return replace(
            new,
            text=new.text + sequence.decoding[0].flush(),
            finish_reason=reason,
            error=str(error) if error else None,
            cause=error if isinstance(error, Exception) else None,
            completion_tokens=len(sequence.token_ids) - len(request.prompt_ids),
            cached_tokens=sequence.num_cached_tokens,
            timings=Timings(
                (sequence.first_scheduled or now) - request.arrival, ttft_s, now - request.arrival
            ),
        )


def _output(
    sequence: Sequence,
    token_ids: tuple[int, ...] = (),
    text: str = "",
    logprobs: tuple[TokenLogprob, ...] = (),
) -> RequestOutput:
    """What is new, and the prompt's log-probabilities if they were not given out yet."""
    prompt_logprobs, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), []
    return RequestOutput(
        sequence.request.id, sequence.index, token_ids, text, logprobs, prompt_logprobs
    )


def model_stop_ids(
    tokenizer: PreTrainedTokenizerBase, eos: int | Iterable[int] | None
) -> frozenset[int]:
    """The tokens that end a sequence: the tokenizer's, and those of the model's generation config."""
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return frozenset([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
