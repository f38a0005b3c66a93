"""The engine: a step is schedule, run, update. One thread calls it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch

from server.engine.errors import ConstraintStuck
from server.engine.native.constraint import Constraints
from server.engine.native.detokenizer import Detokenizer
from server.engine.native.model_runner import ModelRunner
from server.engine.native.output import STEP_FAILED, last_output, take_output
from server.engine.native.scheduler import Scheduler
from server.engine.native.sequence import Sequence
from server.engine.native.step import Step
from server.engine.native.step_budget import StepBudget
from server.engine.native.step_planner import Admission
from server.engine.native.step_results import NewToken, StepResults
from server.engine.native.step_runner import StepRunner
from server.engine.request import EngineCounters, FinishReason, Request, RequestOutput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# A sequence whose adapter finds no room is overtaken by this many others. Then none may start
# before it, so that the running ones release an adapter as they finish.
MAX_OVERTAKEN = 64
MAX_FAULTS = 3  # steps in a row that fail as a whole; then the engine has failed
NUM_PREFETCHED = 64  # selections at the head of the queue whose adapters are loaded ahead


class EngineFailed(Exception):
    """The engine can run no more requests."""


@dataclass
class Engine:
    """Requests go in, the outputs of each step come out.

    Args:
        runner: the model, with the KV cache and the pool of adapters.
        scheduler: has the sequences and the blocks of the KV cache.
        tokenizer: turns the tokens of an answer into text.
        stop_ids: tokens that end every sequence (the model's own).
        max_model_len: the limit on prompt and answer together, in tokens; it fits the KV cache.
        num_tokens: token ids lie below it, those of prompts and those that are sampled. A model may
            have more rows than its tokenizer has tokens.
        budget: limits the tokens of prompts in a step by the time that they take; None: only the
            scheduler does.
        clock: seconds; deadlines and arrivals are times of this clock.
        counters: totals since the start.
        on_pass: called before each forward pass.

    Attributes:
        is_idle: whether the last step had nothing to run.
    """

    runner: ModelRunner
    scheduler: Scheduler
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]
    max_model_len: int
    num_tokens: int
    budget: StepBudget | None = None
    clock: Callable[[], float] = time.monotonic
    counters: EngineCounters = field(default_factory=EngineCounters)
    on_pass: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.pool = self.runner.pool
        blocks = self.scheduler.blocks
        assert blocks.blocks_for(self.max_model_len) <= blocks.capacity
        self.constraints = Constraints(self.tokenizer, self.stop_ids)
        self.is_idle = True
        self._num_faults = 0  # steps in a row that failed as a whole
        self._next_deadline = math.inf  # no sequence has an earlier one

    def add(self, request: Request) -> list[RequestOutput]:
        """Queue the n sequences of a request.

        Args:
            request: its prompt and max_tokens fit max_model_len together.

        Returns:
            Nothing, or the last outputs of a request that cannot begin.
        """
        indices = range(request.sampling.n)
        try:
            self._check_ids(request)
            sequences = [self._new_sequence(request, index) for index in indices]
        except Exception:
            logger.exception("request %s cannot begin", request.id)
            return [_not_begun(request, index) for index in indices]
        for sequence in sequences:
            self.scheduler.add(sequence)
            self._next_deadline = min(self._next_deadline, _deadline(sequence))
        return []

    def abort(self, request_id: str) -> list[RequestOutput]:
        """End every sequence of a request; its blocks are free for the next step."""
        sequences = [s for s in self.scheduler.unfinished() if s.request.id == request_id]
        return [self._finish(s, FinishReason.ABORT) for s in sequences]

    def abort_adapter(self, digest: str) -> list[RequestOutput]:
        """End every running sequence that uses an adapter."""
        sequences = [s for s in self.scheduler.running if digest in s.request.selection]
        return [self._finish(s, FinishReason.ABORT, error="unloaded") for s in sequences]

    def step(self) -> list[RequestOutput]:
        """Schedule, run, update.

        A fault ends the sequences that it can be pinned to, and no others. One that is no
        sequence's own ends all that run.

        Raises:
            EngineFailed: so it was in MAX_FAULTS steps in a row.
        """
        outputs: list[RequestOutput] = []
        self.is_idle = False
        try:
            fault = self._step(outputs)
        except Exception as error:
            logger.exception("a step failed outside of its computation")
            outputs += self._end_failed(list(self.scheduler.running))
            fault = error
        if fault is not None:
            self._num_faults += 1
            if self._num_faults >= MAX_FAULTS:
                message = f"{MAX_FAULTS} steps in a row failed, the last one with: {fault}"
                raise EngineFailed(message) from fault
        return outputs

    def _step(self, outputs: list[RequestOutput]) -> Exception | None:
        """Schedule, run, update.

        Args:
            outputs: receives those of the step, also if it raises.

        Returns:
            The fault, if the model can compute nothing any more.
        """
        outputs += self._end_expired()
        outputs += self._end_unloadable()
        step = self._schedule()
        outputs += self._end_failed(step.failed)
        runner = StepRunner(self.runner, self.num_tokens, self.on_pass)
        if not step.chunks:
            self.is_idle = not step.failed
            return self._probe(runner) if step.failed else None
        started = self.clock()
        results = runner.run(step)
        if self.budget is not None:
            self.budget.measure(self.clock() - started, step.num_prompt_tokens, step.num_decodes)
        self.scheduler.computed(results.computed)
        outputs += self._update(results)
        if results.computed:
            self._num_faults = 0
            return None
        return self._probe(runner)

    def _probe(self, runner: StepRunner) -> Exception | None:
        """Nothing could be computed: is that the sequences' fault, or is the engine broken?

        Returns:
            The fault, if the model cannot compute a token either.
        """
        free = self.scheduler.blocks.allocate(1)
        if free is None:
            return None
        fault = runner.probe(free[0])
        self.scheduler.blocks.release(free)
        return fault

    def seconds_left(self) -> float | None:
        """Return the seconds until the next deadline; None if no sequence has one."""
        deadline = min(map(_deadline, self.scheduler.unfinished()), default=math.inf)
        return None if deadline == math.inf else max(0.0, deadline - self.clock())

    def check_integrity(self) -> None:
        """Check that the accounts of scheduler and adapter pool balance.

        Raises:
            AssertionError: they do not, or the pool's users are not the running sequences.
        """
        self.scheduler.check_integrity()
        self.pool.check_integrity()
        num_users = 0
        for sequence in self.scheduler.running:
            used = [digest for digest in sequence.request.selection if digest is not None]
            num_users += len(used)
        assert self.pool.num_users() == num_users

    def _check_ids(self, request: Request) -> None:
        """Raises ValueError for a token that the model has not; the edge refuses it before."""
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < self.num_tokens:
            raise ValueError(f"a token id of the prompt is not in 0 to {self.num_tokens - 1}")

    def _new_sequence(self, request: Request, index: int) -> Sequence:
        """Make one of a request's n sequences."""
        sampling = request.sampling
        sequence = Sequence(request, index, self.stop_ids)
        sequence.detokenizer = Detokenizer(self.tokenizer, sampling)
        sequence.generator = torch.Generator()
        if sampling.seed is None:
            sequence.generator.seed()
        else:
            sequence.generator.manual_seed(sampling.seed + index)
        if sampling.constraint is not None:
            sequence.matcher = self.constraints.matcher(
                sampling.constraint, sequence.end_ids, ignore_eos=sampling.ignore_eos
            )
        return sequence

    def _schedule(self) -> Step:
        """Plan the next step, load adapters ahead, and keep the accounts of both."""
        # Load in the order in which sequences start: an adapter loaded for an earlier background
        # request would take the room of an interactive one's.
        self.pool.prefetch(islice(self.scheduler.waiting.selections(), NUM_PREFETCHED))
        step = self.scheduler.schedule(self._admit, self._max_prompt_tokens())
        for sequence in step.preempted:
            self.pool.release(sequence.request.selection)
        self._count(step)
        return step

    def _max_prompt_tokens(self) -> int | None:
        """The most tokens of prompts in the next step; None: a prompt alone makes nobody wait."""
        is_alone = len(self.scheduler.running) + len(self.scheduler.waiting) <= 1
        return None if self.budget is None or is_alone else self.budget.max_prompt_tokens()

    def _admit(self, sequence: Sequence) -> Admission:
        """Decide whether a sequence may start; if so, its adapters are in use from here on."""
        selection = sequence.request.selection
        if self.pool.acquire(selection):
            return Admission.NOW
        if sequence.num_overtaken < MAX_OVERTAKEN or self.pool.is_loading(selection):
            return Admission.LATER
        return Admission.HOLD

    def _count(self, step: Step) -> None:
        """Count a step, and each sequence that it schedules for the first time."""
        now = self.clock()
        counters = self.counters
        counters.num_preemptions += len(step.preempted)
        if step.chunks:
            counters.num_steps += 1
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.first_scheduled is not None:
                continue
            sequence.first_scheduled = now
            num_prompt_tokens = len(sequence.request.prompt_ids)
            counters.prompt_tokens += num_prompt_tokens
            if self.scheduler.root_of is not None:
                counters.prefix_cache_queries += num_prompt_tokens
                counters.prefix_cache_hits += chunk.start

    def _end_expired(self) -> list[RequestOutput]:
        """End the sequences whose deadline has passed."""
        now = self.clock()
        if now < self._next_deadline:
            return []
        expired = [s for s in self.scheduler.unfinished() if _deadline(s) <= now]
        outputs = [self._finish(s, FinishReason.ABORT, error="deadline") for s in expired]
        self._next_deadline = min(map(_deadline, self.scheduler.unfinished()), default=math.inf)
        return outputs

    def _end_unloadable(self) -> list[RequestOutput]:
        """End the sequences that wait for an adapter that cannot be loaded, with the reason."""
        outputs = []
        for digest, cause in self.pool.take_failures().items():
            sequences = [s for s in self.scheduler.waiting if digest in s.request.selection]
            outputs += [self._finish(s, FinishReason.ERROR, error=cause) for s in sequences]
        return outputs

    def _end_failed(self, sequences: list[Sequence]) -> list[RequestOutput]:
        """End the sequences that a fault was pinned to."""
        return [self._finish(s, FinishReason.ERROR, error=STEP_FAILED) for s in sequences]

    def _update(self, results: StepResults) -> list[RequestOutput]:
        """Give every sequence what a step has for it."""
        now = self.clock()
        outputs = []
        for new in results.tokens:
            if new.sequence.first_token is None:
                new.sequence.first_token = now
            try:
                outputs.append(self._append(new))
            except Exception:
                logger.exception("request %s cannot take a token", new.sequence.request.id)
                outputs += self._end_failed([new.sequence])
        outputs += [self._finish(s, FinishReason.LENGTH) for s in results.measured]
        for sequence, reason in results.stuck:
            outputs.append(
                self._finish(sequence, FinishReason.ERROR, error=_stuck(sequence, reason))
            )
        return outputs + self._end_overflown(results.overflown) + self._end_failed(results.failed)

    def _end_overflown(self, sequences: list[Sequence]) -> list[RequestOutput]:
        """End sequences whose logits are not numbers: finite weights can overflow."""
        if not sequences:
            return []
        logger.error("%d sequences end with an error: their logits are not numbers", len(sequences))
        error = "the model and adapters overflow on this prompt"
        return [self._finish(s, FinishReason.ERROR, error=error) for s in sequences]

    def _append(self, new: NewToken) -> RequestOutput:
        """Give a sequence its next token, and end it if that token ends it."""
        sequence, token, logprobs = new
        sampling = sequence.request.sampling
        is_end = sequence.ends_with(token)
        if is_end and not sampling.include_stop_str_in_output:
            return self._finish(sequence, FinishReason.STOP)
        sequence.token_ids.append(token)
        self.counters.generation_tokens += 1
        text = sequence.detokenizer.add(token)
        output = take_output(sequence, (token,), text, logprobs)
        if is_end or sequence.detokenizer.stopped:
            return self._finish(sequence, FinishReason.STOP, output)
        if sequence.num_output_tokens >= sampling.max_tokens:
            return self._finish(sequence, FinishReason.LENGTH, output)
        if sequence.matcher is not None:
            sequence.matcher.accept(token)
        self.scheduler.grown(sequence)
        return output

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        output: RequestOutput | None = None,
        error: str | Exception | None = None,
    ) -> RequestOutput:
        """Take a sequence out of the scheduler, and release its adapters if it was running.

        Args:
            output: what this step adds to the answer, if anything.
            error: why it failed or was cut short; an exception is raised in place of the output.

        Returns:
            The sequence's last output: `output`, the text that was held back, and the totals.
        """
        if output is None:
            output = take_output(sequence)
        if self.scheduler.remove(sequence):
            self.pool.release(sequence.request.selection)
        return last_output(sequence, output, reason, error, self.clock())


def _deadline(sequence: Sequence) -> float:
    """A sequence's deadline; infinity if it has none."""
    deadline = sequence.request.deadline
    return math.inf if deadline is None else deadline


def _stuck(sequence: Sequence, reason: str) -> ConstraintStuck:
    """The error of a sequence that cannot go on: it names the field that set the constraint."""
    constraint = sequence.request.sampling.constraint
    field = None if constraint is None else constraint.field
    return ConstraintStuck(reason, field=field)


def _not_begun(request: Request, index: int) -> RequestOutput:
    """The only output of a sequence that could not be made."""
    return RequestOutput(request.id, index, finish_reason=FinishReason.ERROR, error=STEP_FAILED)


def model_stop_ids(
    tokenizer: PreTrainedTokenizerBase, eos: int | Iterable[int] | None
) -> frozenset[int]:
    """Return the tokens that end a sequence.

    Args:
        tokenizer: its end token is one of them.
        eos: the end tokens of the model's generation config.
    """
    stop_ids: set[int] = set()
    if isinstance(eos, int):
        stop_ids.add(eos)
    elif eos is not None:
        stop_ids.update(eos)
    if tokenizer.eos_token_id is not None:
        stop_ids.add(tokenizer.eos_token_id)
    return frozenset(stop_ids)
