"""The state of one sequence inside the engine. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.request import FinishReason, Request


@dataclass(eq=False, slots=True)
class Sequence:
    """One of a request's n continuations. `slot` is its row in the KV cache while it runs."""

    request: Request
    index: int
    token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    finish_reason: FinishReason | None = None
    first_scheduled: float | None = None
    first_token: float | None = None

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose KV is in the cache: all but the newest, once the prompt has run."""
        return len(self.request.prompt_ids) + len(self.token_ids) - 1 if self.token_ids else 0

    @property
    def is_finished(self) -> bool:
        """True once a finish reason is set."""
        return self.finish_reason is not None
