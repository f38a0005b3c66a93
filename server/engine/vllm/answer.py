"""One sequence of a request: what vLLM says of it, as outputs of the seam."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from server.engine.native.detokenizer import Detokenizer
from server.engine.native.output import STEP_FAILED
from server.engine.request import FinishReason, Request, RequestOutput, Timings, TokenLogprob

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput as VllmOutput


class Answer:
    """Takes vLLM's outputs of one sequence, in order, until it is finished.

    Args:
        request: of which it is a part.
        index: its number in the request.
        tokenizer: a fast tokenizer.
        model_end_ids: tokens that end every sequence.

    Attributes:
        is_finished: its last output has been made.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        tokenizer: PreTrainedTokenizerBase,
        model_end_ids: frozenset[int],
    ) -> None:
        self.request = request
        self.index = index
        self.is_finished = False
        self.end_ids = _end_ids(request, model_end_ids)
        self._detokenizer = Detokenizer(tokenizer, request.sampling)
        self._num_tokens = 0
        self._num_cached = 0
        self._first_scheduled: float | None = None
        self._first_token: float | None = None

    @property
    def num_tokens(self) -> int:
        """The length of the answer so far."""
        return self._num_tokens

    def take(self, output: VllmOutput) -> RequestOutput:
        """The new tokens, or the last output if they end the answer."""
        (completion,) = output.outputs
        self._note_times(output)
        ours = RequestOutput(self.request.id, self.index)
        ours = replace(ours, prompt_logprobs=self._prompt_logprobs(output.prompt_logprobs))
        if self.request.sampling.max_tokens == 0:
            return self._end(ours, FinishReason.LENGTH)
        tokens = list(completion.token_ids)
        reason = _reason(completion.finish_reason)
        if reason is FinishReason.ERROR:
            return self._end(replace(ours, error=STEP_FAILED), reason)
        is_ended = reason is FinishReason.STOP and tokens[-1:] and tokens[-1] in self.end_ids
        if is_ended and not self.request.sampling.include_stop_str_in_output:
            tokens.pop()
        text, num_kept = self._decode(tokens)
        logprobs = self._logprobs(completion.logprobs or ())
        ours = replace(
            ours, token_ids=tuple(tokens[:num_kept]), text=text, logprobs=logprobs[:num_kept]
        )
        self._num_tokens += num_kept
        if self._detokenizer.stopped:
            reason = FinishReason.STOP
        return ours if reason is None else self._end(ours, reason)

    def end(
        self, reason: FinishReason, error: str | None = None, cause: Exception | None = None
    ) -> RequestOutput:
        """The last output of a sequence that ends for another reason than its tokens."""
        return self._end(
            RequestOutput(self.request.id, self.index, error=error, cause=cause), reason
        )

    def _decode(self, tokens: list[int]) -> tuple[str, int]:
        """The text that is certain now, and how many of the tokens belong to the answer."""
        text = ""
        for position, token in enumerate(tokens):
            text += self._detokenizer.add(token)
            if self._detokenizer.stopped:
                return text, position + 1
        return text, len(tokens)

    def _end(self, output: RequestOutput, reason: FinishReason) -> RequestOutput:
        self.is_finished = True
        return replace(
            output,
            text=output.text + self._detokenizer.flush(),
            finish_reason=reason,
            completion_tokens=self._num_tokens,
            cached_tokens=self._num_cached,
            timings=self._timings(time.monotonic()),
        )

    def _note_times(self, output: VllmOutput) -> None:
        """Keep what vLLM says of the first step. Its clock is that of time.monotonic()."""
        if self._first_token is not None:
            return
        now = time.monotonic()
        scheduled = output.metrics.scheduled_ts if output.metrics is not None else 0.0
        self._first_token = now
        self._first_scheduled = min(scheduled or now, now)
        self._num_cached = output.num_cached_tokens or 0

    def _timings(self, now: float) -> Timings:
        arrival = self.request.arrival
        scheduled = now if self._first_scheduled is None else self._first_scheduled
        has_token = self._first_token is not None and self.request.sampling.max_tokens > 0
        ttft_s = self._first_token - arrival if has_token and self._first_token else None
        return Timings(queue_s=scheduled - arrival, ttft_s=ttft_s, e2e_s=now - arrival)

    def _logprobs(self, positions: Any) -> tuple[TokenLogprob, ...]:
        return tuple(_logprob(each, self.request.sampling.logprobs or 0) for each in positions)

    def _prompt_logprobs(self, positions: Any) -> tuple[TokenLogprob, ...]:
        """Those that are asked for. vLLM has None for the first token of a prompt."""
        sampling = self.request.sampling
        if sampling.prompt_logprobs is None or not positions:
            return ()
        asked = positions[sampling.prompt_logprobs_from :]
        return tuple(_logprob(each, sampling.prompt_logprobs) for each in asked)


def _end_ids(request: Request, model_end_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end a sequence of a request."""
    named = frozenset(request.sampling.stop_token_ids)
    if request.sampling.ignore_eos:
        return named
    return named.union(model_end_ids, request.stop_token_ids)


def _reason(finish_reason: str | None) -> FinishReason | None:
    """vLLM's reason as ours; one that is not ours is an error."""
    if finish_reason is None:
        return None
    known = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "abort": FinishReason.ABORT}
    return known.get(finish_reason, FinishReason.ERROR)


def _logprob(position: dict[int, Logprob], num_top: int) -> TokenLogprob:
    """The token's own log-probability, which comes first, and the most probable ones by rank."""
    own = next(iter(position.values()))
    by_rank = sorted(position.items(), key=lambda item: item[1].rank or 0)
    top = tuple((token, each.logprob) for token, each in by_rank[:num_top])
    return TokenLogprob(own.logprob, top)
