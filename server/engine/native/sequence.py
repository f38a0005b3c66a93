"""The state of one sequence inside the engine. No torch."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.engine.native.block_pool import Key
from server.engine.request import Request, TokenLogprob

if TYPE_CHECKING:
    from torch import Generator

    from server.engine.native.constraint import Matcher
    from server.engine.native.detokenizer import Detokenizer


@dataclass(eq=False, slots=True)
class Sequence:
    """One of the n answers to a request.

    Attributes:
        index: its number among the n.
        model_end_ids: tokens that end every sequence (the model's own).
        token_ids: the prompt, and the answer so far.
        num_computed_tokens: how many of them have keys and values in the blocks of `block_table`.
        num_cached_tokens: how many of them it found in the prefix cache when it first started.
        block_keys: keys of its full blocks, as far as they were needed. Tokens are only ever
            appended, so the keys stay valid as long as its rotary frequencies do.
        num_overtaken: sequences behind it that started while it waited for its adapters.
        prompt_logprobs: log-probabilities of prompt tokens that no output has carried yet.
        first_scheduled: the engine's clock when it first ran, in seconds.
        first_token: the engine's clock when its first token was sampled, in seconds.
        detokenizer: turns its tokens into text. The engine sets it; scheduling never reads it.
        generator: the source of its random numbers, likewise.
        matcher: says which tokens its constraint allows next, likewise; None: all.
    """

    request: Request
    index: int
    model_end_ids: frozenset[int] = frozenset()
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[Key] = field(default_factory=list)
    num_overtaken: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    first_scheduled: float | None = None
    first_token: float | None = None
    detokenizer: "Detokenizer" = field(init=False, repr=False)
    generator: "Generator" = field(init=False, repr=False)
    matcher: "Matcher | None" = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        """The length of the answer so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def forbidden_ids(self) -> frozenset[int]:
        """Tokens that may not come next: those that would end the answer before `min_tokens`."""
        sampling = self.request.sampling
        if self.num_output_tokens >= sampling.min_tokens:
            return frozenset()
        return self.end_ids.union(sampling.stop_token_ids)

    @property
    def end_ids(self) -> frozenset[int]:
        """The end tokens of model and prompt format."""
        return self.model_end_ids.union(self.request.stop_token_ids)

    def ends_with(self, token: int) -> bool:
        """Whether this token ends the answer."""
        sampling = self.request.sampling
        if token in sampling.stop_token_ids:
            return True
        is_end = token in self.model_end_ids or token in self.request.stop_token_ids
        # With ignore_eos, a constraint leaves an end token only where nothing else may follow.
        return is_end and (not sampling.ignore_eos or sampling.constraint is not None)

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 in decode."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_prefilling(self) -> bool:
        """Whether more than its newest token has still to be computed."""
        return self.num_pending_tokens > 1

    @property
    def first_logits(self) -> int:
        """The first position whose logits say something about a token that is asked for."""
        return self.request.sampling.prompt_logprobs_from - 1

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of prompt tokens are still to be computed.

        Only sequence 0 of a request computes them, before its first token.
        """
        is_asked = self.request.sampling.prompt_logprobs is not None
        return is_asked and self.index == 0 and self.num_output_tokens == 0
