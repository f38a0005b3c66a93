"""What the logits of a step say: new tokens, log-probabilities, and which sequences overflow."""

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from server.engine.native.batch import Batch
from server.engine.native.constraint import Stuck, constrained
from server.engine.native.sampler import (
    SamplingRow,
    are_numbers,
    rewind,
    sample,
    token_logprobs,
)
from server.engine.native.sequence import Sequence
from server.engine.native.step import Chunk
from server.engine.request import TokenLogprob

logger = logging.getLogger(__name__)


class NewToken(NamedTuple):
    """The next token of a sequence, with its log-probability if the request asks for it."""

    sequence: Sequence
    token: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class StepResults:
    """The results of a step, or of a part of it.

    Attributes:
        computed: the chunks whose keys and values are in the cache.
        tokens: one for every sequence whose chunk ends at its newest token.
        measured: sequences that are to get no token (`max_tokens` 0), and whose prompt is computed.
        overflown: sequences whose logits are not numbers; they get no token.
        failed: sequences in whose computation something raised; they get no token.
        stuck: sequences that cannot go on under their constraint, and why.
    """

    computed: list[Chunk] = field(default_factory=list)
    tokens: list[NewToken] = field(default_factory=list)
    measured: list[Sequence] = field(default_factory=list)
    overflown: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)
    stuck: list[tuple[Sequence, str]] = field(default_factory=list)

    @classmethod
    def of(cls, batch: Batch, logits: Tensor, num_tokens: int) -> "StepResults":
        """Sample, and keep the log-probabilities of prompt tokens in their sequences.

        Args:
            logits: [rows, vocab] fp32, those of `batch.logit_rows`.
            num_tokens: only token ids below it are sampled.
        """
        results = cls(batch.chunks)
        is_valid = are_numbers(logits)
        sampled_rows: list[int] = []
        sampled: list[Sequence] = []
        first_row = 0
        for chunk, num_rows in zip(batch.chunks, batch.num_logits, strict=True):
            rows = slice(first_row, first_row + num_rows)
            first_row += num_rows
            if not all(is_valid[rows]):
                results.overflown.append(chunk.sequence)
            elif not _took_prompt_logprobs(chunk, logits, rows, num_tokens):
                results.failed.append(chunk.sequence)
            elif chunk.samples and chunk.sequence.request.sampling.max_tokens == 0:
                results.measured.append(chunk.sequence)
            elif chunk.samples:
                sampled_rows.append(rows.stop - 1)
                sampled.append(chunk.sequence)
        if sampled:
            results._sample(logits, sampled_rows, sampled, num_tokens)
        return results

    def __add__(self, other: "StepResults") -> "StepResults":
        """The results of two parts of a step."""
        return StepResults(
            self.computed + other.computed,
            self.tokens + other.tokens,
            self.measured + other.measured,
            self.overflown + other.overflown,
            self.failed + other.failed,
            self.stuck + other.stuck,
        )

    def _sample(
        self, logits: Tensor, rows: list[int], sequences: list[Sequence], num_tokens: int
    ) -> None:
        """Add the next token of each sequence: of all at once, or after a fault one by one.

        Args:
            logits: [rows, vocab] fp32.
            rows: one of them for each sequence.
        """
        try:
            self.tokens.extend(_new_tokens(_of(rows, logits), sequences, num_tokens))
        except Stuck:
            pass  # before any draw; not this server's fault, so it is not logged
        except Exception:
            logger.exception("%d sequences could not be sampled together", len(sequences))
            for sequence in sequences:
                rewind(sequence.generator, sequence.num_output_tokens)
        else:
            return
        for row, sequence in zip(rows, sequences, strict=True):
            try:
                self.tokens.extend(_new_tokens(logits[[row]], [sequence], num_tokens))
            except Stuck as error:
                self.stuck.append((sequence, str(error)))
            except Exception:
                logger.exception("request %s could not be sampled", sequence.request.id)
                self.failed.append(sequence)


def _of(rows: list[int], logits: Tensor) -> Tensor:
    """Some rows of logits, given in ascending order. All of them are not copied."""
    return logits if len(rows) == len(logits) else logits[rows]


def _took_prompt_logprobs(chunk: Chunk, logits: Tensor, rows: slice, num_tokens: int) -> bool:
    """Keep the log-probabilities of a chunk's prompt tokens if it wants them; False: it failed.

    Args:
        rows: those of the chunk.
    """
    sequence = chunk.sequence
    if not sequence.wants_prompt_logprobs:
        return True
    start = chunk.stop - (rows.stop - rows.start)
    try:
        _add_prompt_logprobs(sequence, start, logits[rows], num_tokens)
    except Exception:
        logger.exception("request %s: no log-probabilities of its prompt", sequence.request.id)
        return False
    return True


def _new_tokens(logits: Tensor, sequences: list[Sequence], num_tokens: int) -> list[NewToken]:
    """Choose the next token of each sequence.

    Args:
        logits: [b, vocab] fp32, a row for each sequence.

    Raises:
        Stuck: a sequence has no next token under its constraint.
    """
    rows = [_sampling_row(sequence, num_tokens) for sequence in sequences]
    choosable = constrained(logits[:, :num_tokens], [each.matcher for each in sequences])
    tokens = sample(choosable, rows)
    if max(tokens) >= num_tokens:
        raise ValueError("the sampling options leave no probable token")
    logprobs = _sampled_logprobs(logits, sequences, tokens, num_tokens)
    return [NewToken(*new) for new in zip(sequences, tokens, logprobs, strict=True)]


def _sampling_row(sequence: Sequence, num_tokens: int) -> SamplingRow:
    request = sequence.request
    forbidden = [token for token in sequence.forbidden_ids if token < num_tokens]
    return SamplingRow(
        request.sampling, request.prompt_ids, sequence.output_ids, sequence.generator, forbidden
    )


def _add_prompt_logprobs(sequence: Sequence, start: int, logits: Tensor, num_tokens: int) -> None:
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
    sequence.prompt_logprobs += token_logprobs(logits[: len(targets)], targets, num_top, num_tokens)


def _sampled_logprobs(
    logits: Tensor, sequences: list[Sequence], tokens: list[int], num_tokens: int
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
        found = token_logprobs(
            _of(rows, logits), [tokens[row] for row in rows], num_top, num_tokens
        )
        for row, logprob in zip(rows, found, strict=True):
            logprobs[row] = (logprob,)
    return logprobs
