"""The state of one sequence inside the engine. No torch."""

from dataclasses import dataclass, field
from typing import Any

from server.engine.native.block_pool import Key
from server.engine.request import Request, TokenLogprob


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's n continuations.

    token_ids: prompt and answer. num_computed_tokens: how many of them have their keys and values in `block_table`.
    block_keys: of the full blocks, as far as they were needed; tokens are only ever added, so they stay right.
    num_overtaken: sequences behind it that started while it waited for its adapters.
    decoding: (detokenizer, generator), which turn its logits into text; the engine's.
    """

    request: Request
    index: int
    token_ids: list[int] = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[Key] = field(default_factory=list)
    num_overtaken: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    first_scheduled: float | None = None
    first_token: float | None = None
    decoding: Any = None

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_ids)

    @property
    def output_ids(self) -> list[int]:
        """The answer so far."""
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def num_pending_tokens(self) -> int:
        """Tokens still to be computed before the next one can be sampled; 1 in decode."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Sequence 0 of a request that asked for them, until it has begun to answer."""
        asked = self.request.sampling.prompt_logprobs is not None
        return asked and self.index == 0 and len(self.token_ids) == len(self.request.prompt_ids)
