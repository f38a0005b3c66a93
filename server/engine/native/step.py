"""A planned step: the tokens that it computes, and for which sequences. No torch."""

from dataclasses import dataclass, field

from server.engine.native.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """`count` tokens of a sequence, from position `start`.

    The next token is sampled if they include the newest one.
    """

    sequence: Sequence
    start: int
    count: int

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + self.count

    @property
    def samples(self) -> bool:
        """Whether the chunk ends at the sequence's newest token."""
        return self.stop == len(self.sequence.token_ids)

    @property
    def is_prompt(self) -> bool:
        """Whether it is a part of a prompt, or of a sequence computed again; False: of decode."""
        return self.count > 1 or not self.samples or self.sequence.num_output_tokens == 0

    @property
    def num_logits(self) -> int:
        """How many tokens at the end of the chunk need logits.

        The logits at a position are those of the token after it: prompt log-probabilities from
        token number k on need the logits from position k - 1 on.
        """
        num_sampled = 1 if self.samples else 0
        return max(num_sampled, self.num_prompt_logits)

    @property
    def num_prompt_logits(self) -> int:
        """How many tokens at the end of the chunk need logits for the prompt's log-probabilities.

        The prompt's last token is one of them, although its logits say nothing about the prompt.
        """
        if not self.sequence.wants_prompt_logprobs:
            return 0
        return max(0, self.stop - max(self.start, self.sequence.first_logits))


@dataclass(frozen=True, slots=True)
class Step:
    """A planned step.

    Attributes:
        chunks: the tokens to compute, at most one chunk for a sequence.
        new_blocks: blocks allocated for them, whose old content must not reach an answer.
        preempted: sequences that went back to the queue, in the order in which they did.
        failed: sequences that could not be planned, because something raised.
    """

    chunks: list[Chunk] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    failed: list[Sequence] = field(default_factory=list)

    @property
    def num_decodes(self) -> int:
        """How many sequences only get their next token."""
        return sum(not chunk.is_prompt for chunk in self.chunks)

    @property
    def num_prompt_tokens(self) -> int:
        """How many tokens of prompts, or of sequences computed again, it has."""
        return sum(chunk.count for chunk in self.chunks if chunk.is_prompt)
