"""The engine: a step is schedule, run, update. One thread; everything else goes round it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from server.engine.batch import build_batch
from server.engine.detokenizer import Detokenizer
from server.engine.model_runner import ModelRunner
from server.engine.request import FinishReason, Request, RequestOutput, Timings
from server.engine.sampler import sample
from server.engine.scheduler import Scheduler, Step
from server.engine.sequence import Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass
class _Decoding:
    """What turns a sequence's logits into text."""

    detokenizer: Detokenizer
    generator: torch.Generator


@dataclass
class EngineCounters:
    """Totals since the start."""

    num_steps: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0


@dataclass
class Engine:
    """Sequences in, outputs out.

    Args:
        stop_ids: tokens that end every sequence (the model's own).
        max_model_len: prompt and answer together, in tokens.
    """

    runner: ModelRunner
    scheduler: Scheduler
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    max_model_len: int
    clock: Callable[[], float] = time.monotonic
    counters: EngineCounters = field(default_factory=EngineCounters)

    def __post_init__(self) -> None:
        self._decoding: dict[Sequence, _Decoding] = {}

    def add(self, request: Request) -> None:
        """Queue the n sequences of a request whose adapters are resident."""
        for index in range(request.sampling.n):
            sequence = Sequence(request, index)
            generator = torch.Generator()
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed + index)
            self._decoding[sequence] = _Decoding(Detokenizer(self.tokenizer, request.sampling.stop), generator)
            self.scheduler.add(sequence)

    def abort(self, request_id: str, error: str | None = None) -> list[RequestOutput]:
        """End every sequence of a request; its slots are free for the next step."""
        return [self._finish(s, FinishReason.ABORT, error=error) for s in self.scheduler.find(request_id)]

    def step(self) -> list[RequestOutput]:
        """Schedule, run, update. A failed forward pass ends the sequences that were in it, and nothing else."""
        expired = self._expire()
        if not self.scheduler.has_work():
            return expired
        step = self.scheduler.schedule()
        now = self.clock()
        for sequence in step.sequences:
            sequence.first_scheduled = sequence.first_scheduled or now
        try:
            logits = self.runner.run(build_batch(step, self.runner.device))
        except Exception:
            logger.exception("a step failed; its %d sequences end with an error", len(step.sequences))
            return expired + [self._finish(s, FinishReason.ERROR, error="the step failed") for s in step.sequences]
        return expired + self._update(step, logits)

    def check_integrity(self) -> None:
        """AssertionError where the books do not balance."""
        self.scheduler.check_integrity()
        assert set(self._decoding) == {*self.scheduler.waiting, *self.scheduler.running}

    def _expire(self) -> list[RequestOutput]:
        now = self.clock()
        late = [
            s
            for queue in (self.scheduler.waiting, self.scheduler.running)
            for s in queue
            if s.request.deadline is not None and now >= s.request.deadline
        ]
        return [self._finish(s, FinishReason.ABORT, error="deadline") for s in late]

    def _update(self, step: Step, logits: torch.Tensor) -> list[RequestOutput]:
        not_numbers = (logits.isnan() | logits.isposinf()).any(-1)
        logits = logits.masked_fill(not_numbers[:, None], 0.0)  # the sampler may not meet them
        params = [s.request.sampling for s in step.sequences]
        tokens, logprobs = sample(logits, params, [self._decoding[s].generator for s in step.sequences])
        self.counters.num_steps += 1
        if step.is_prefill:
            self.counters.prompt_tokens += sum(len(s.request.prompt_ids) for s in step.sequences)
        broken = {s for s, is_nan in zip(step.sequences, not_numbers.tolist(), strict=True) if is_nan}
        if broken:
            logger.error("%d sequences end with an error: their logits are not numbers", len(broken))
            self.runner.clear([s.slot for s in broken if s.slot is not None])
        now = self.clock()
        return [
            self._finish(sequence, FinishReason.ERROR, error="the model and adapters overflow on this prompt")
            if sequence in broken
            else self._append(sequence, token, logprob, now)
            for sequence, token, logprob in zip(step.sequences, tokens, logprobs, strict=True)
        ]

    def _append(self, sequence: Sequence, token: int, logprob: float | None, now: float) -> RequestOutput:
        """Give a sequence its next token, and end it where that ends it."""
        request = sequence.request
        sequence.first_token = sequence.first_token or now
        is_end = token in self.stop_ids or token in request.stop_token_ids
        if is_end and not request.sampling.ignore_eos:
            return self._finish(sequence, FinishReason.STOP)
        sequence.token_ids.append(token)
        self.counters.generation_tokens += 1
        detokenizer = self._decoding[sequence].detokenizer
        text, new = detokenizer.add(token), ((token,), () if logprob is None else (logprob,))
        if detokenizer.stopped:
            return self._finish(sequence, FinishReason.STOP, text, new)
        if len(sequence.token_ids) >= request.sampling.max_tokens:
            return self._finish(sequence, FinishReason.LENGTH, text, new)
        return RequestOutput(request.id, sequence.index, new[0], text, new[1])

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        new: tuple[tuple[int, ...], tuple[float, ...]] = ((), ()),
        error: str | None = None,
    ) -> RequestOutput:
        self.scheduler.remove(sequence)
        sequence.finish_reason = reason
        text += self._decoding.pop(sequence).detokenizer.flush()
        now, arrival = self.clock(), sequence.request.arrival
        return RequestOutput(
            request_id=sequence.request.id,
            index=sequence.index,
            token_ids=new[0],
            text=text,
            logprobs=new[1],
            finish_reason=reason,
            error=error,
            completion_tokens=len(sequence.token_ids),
            timings=Timings(
                queue_s=(sequence.first_scheduled or now) - arrival,
                ttft_s=None if sequence.first_token is None else sequence.first_token - arrival,
                e2e_s=now - arrival,
            ),
        )


def model_stop_ids(tokenizer: PreTrainedTokenizerBase, eos: int | Iterable[int] | None) -> frozenset[int]:
    """The tokens that end a sequence: the tokenizer's, and those of the model's generation config."""
    ids = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return frozenset([*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
