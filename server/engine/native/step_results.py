"""What the logits of a step say: new tokens, log-probabilities, and which sequences overflow."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from server.engine.native.batch import Batch
from server.engine.native.sampler import SamplingRow, sample, token_logprobs
from server.engine.native.sequence import Sequence
from server.engine.request import TokenLogprob


class NewToken(NamedTuple):
    """The next token of a sequence, with its log-probability if the request asks for it."""

    sequence: Sequence
    token: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class StepResults:
    """The results of a step.

    Attributes:
        tokens: one for every sequence whose chunk ends at its newest token.
        measured: sequences that are to get no token (`max_tokens` 0), and whose prompt is computed.
        overflown: sequences whose logits are not numbers; they get no token.
    """

    tokens: list[NewToken]
    measured: list[Sequence]
    overflown: list[Sequence]

    @classmethod
    def of(cls, batch: Batch, logits: Tensor) -> "StepResults":
        """Sample, and keep the log-probabilities of prompt tokens in their sequences.

        Args:
            logits: [rows, vocab] fp32, those of `batch.logit_rows`.
        """
        # The largest value of a row that has a NaN or +inf, neither of which the sampler takes, is
        # not finite.
        is_valid = logits.amax(-1).isfinite().tolist()
        sampled_rows: list[int] = []
        sampled: list[Sequence] = []
        measured: list[Sequence] = []
        overflown: list[Sequence] = []
        first_row = 0
        for chunk, num_rows in zip(batch.chunks, batch.num_logits, strict=True):
            rows = slice(first_row, first_row + num_rows)
            first_row += num_rows
            if not all(is_valid[rows]):
                overflown.append(chunk.sequence)
                continue
            if chunk.sequence.wants_prompt_logprobs:
                _add_prompt_logprobs(chunk.sequence, chunk.stop - num_rows, logits[rows])
            if chunk.samples and chunk.sequence.request.sampling.max_tokens == 0:
                measured.append(chunk.sequence)
            elif chunk.samples:
                sampled_rows.append(rows.stop - 1)
                sampled.append(chunk.sequence)
        tokens = _new_tokens(logits[sampled_rows], sampled) if sampled else []
        return cls(tokens, measured, overflown)


def _new_tokens(logits: Tensor, sequences: list[Sequence]) -> list[NewToken]:
    """Choose the next token of each sequence.

    Args:
        logits: [b, vocab] fp32, a row for each sequence.
    """
    rows = [
        SamplingRow(
            s.request.sampling, s.request.prompt_ids, s.output_ids, s.generator, s.forbidden_ids
        )
        for s in sequences
    ]
    tokens = sample(logits, rows)
    logprobs = _sampled_logprobs(logits, sequences, tokens)
    return [NewToken(*new) for new in zip(sequences, tokens, logprobs, strict=True)]


def _add_prompt_logprobs(sequence: Sequence, start: int, logits: Tensor) -> None:
    """Keep the log-probabilities of prompt tokens for the sequence's first output.

    Args:
        start: the position of the first row.
        logits: [rows, vocab] fp32. Those at a position are of the token after it, so that the
            last prompt token's say nothing about the prompt.
    """
    sampling = sequence.request.sampling
    # A preempted sequence computes positions again: drop what it had from here on.
    del sequence.prompt_logprobs[max(0, start + 1 - sampling.prompt_logprobs_from) :]
    targets = sequence.request.prompt_ids[start + 1 : start + 1 + len(logits)]
    num_top = [sampling.prompt_logprobs or 0] * len(targets)
    sequence.prompt_logprobs += token_logprobs(logits[: len(targets)], targets, num_top)


def _sampled_logprobs(
    logits: Tensor, sequences: list[Sequence], tokens: list[int]
) -> list[tuple[TokenLogprob, ...]]:
    """Return one log-probability for each sequence that asks for them, none for the others."""
    logprobs: list[tuple[TokenLogprob, ...]] = [()] * len(sequences)
    rows: list[int] = []
    num_top: list[int] = []
    for row, sequence in enumerate(sequences):
        k = sequence.request.sampling.logprobs
        if k is not None:
            rows.append(row)
            num_top.append(k)
    if rows:
        found = token_logprobs(logits[rows], [tokens[row] for row in rows], num_top)
        for row, logprob in zip(rows, found, strict=True):
            logprobs[row] = (logprob,)
    return logprobs
