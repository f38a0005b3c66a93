"""What a sequence hands out: the output of a step, and the last one with its totals."""

import logging
from dataclasses import replace

from server.engine.native.sequence import Sequence
from server.engine.request import FinishReason, RequestOutput, Timings, TokenLogprob

logger = logging.getLogger(__name__)

STEP_FAILED = "the step failed"  # the error of a sequence that a fault of the engine ends


def take_output(
    sequence: Sequence,
    token_ids: tuple[int, ...] = (),
    text: str = "",
    logprobs: tuple[TokenLogprob, ...] = (),
) -> RequestOutput:
    """Make an output of new tokens, and of the prompt's log-probabilities if it is the first."""
    prompt_logprobs = tuple(sequence.prompt_logprobs)
    sequence.prompt_logprobs = []
    return RequestOutput(
        sequence.request.id, sequence.index, token_ids, text, logprobs, prompt_logprobs
    )


def last_output(
    sequence: Sequence,
    output: RequestOutput,
    reason: FinishReason,
    error: str | Exception | None,
    now: float,
) -> RequestOutput:
    """Complete an output with the text that was held back, and with the totals of its sequence.

    Args:
        output: what the sequence's last step adds to the answer.
        error: why it failed or was cut short; an exception is raised in place of the output.
        now: the engine's clock, in seconds.
    """
    text = output.text
    try:
        text += sequence.detokenizer.flush()
    except Exception:
        logger.exception("request %s: its last text cannot be decoded", sequence.request.id)
        reason, error = FinishReason.ERROR, STEP_FAILED
    return replace(
        output,
        text=text,
        finish_reason=reason,
        error=None if error is None else str(error),
        cause=error if isinstance(error, Exception) else None,
        completion_tokens=sequence.num_output_tokens,
        cached_tokens=sequence.num_cached_tokens,
        timings=_timings(sequence, now),
    )


def _timings(sequence: Sequence, now: float) -> Timings:
    """The timings of a sequence that ends now; one that never ran was queued all the time."""
    arrival = sequence.request.arrival
    first_scheduled = now if sequence.first_scheduled is None else sequence.first_scheduled
    ttft_s = None if sequence.first_token is None else sequence.first_token - arrival
    return Timings(queue_s=first_scheduled - arrival, ttft_s=ttft_s, e2e_s=now - arrival)
