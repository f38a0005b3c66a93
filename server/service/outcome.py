"""What is known of a request of the engine that has ended: for metrics, traces and the access log.

It holds counts, times and names, and nothing of what the request said or was told.
"""

from dataclasses import dataclass

from server.engine.request import FinishReason, Request, Timings

Labels = tuple[str, str]  # of a request: adapter (see `Metrics.adapter_label`), crma (on or off)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request ended, over all its sequences.

    Attributes:
        request: what was asked.
        task: the store name of its task adapter; None: the base model.
        labels: as the metrics have them.
        reasons: of each sequence: stop, length, abort or error.
        output_tokens: of each sequence, as far as it came.
        cached_tokens: of the prompt, those that the prefix cache had.
        timings: of the whole request; None where it did not finish.
        error: the code of the error that ended it; None where it finished.
        own_deadline: its client chose the deadline.
    """

    request: Request
    task: str | None
    labels: Labels
    reasons: tuple[FinishReason, ...]
    output_tokens: tuple[int, ...]
    cached_tokens: int
    timings: Timings | None
    error: str | None
    own_deadline: bool

    @property
    def reason(self) -> FinishReason:
        """Of the whole request: that of its first sequence."""
        return self.reasons[0]

    @property
    def operation(self) -> str:
        """What was asked for, as OpenTelemetry names it; the request's id begins with its route."""
        is_chat = self.request.id.startswith(("chatcmpl-", "resp-"))
        return "chat" if is_chat else "text_completion"

    @property
    def prompt_tokens(self) -> int:
        """The length of the prompt."""
        return len(self.request.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Of the prompt and of all answers."""
        return self.prompt_tokens + sum(self.output_tokens)
