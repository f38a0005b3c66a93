"""Errors of an engine: requests that it refuses, and operations on adapters that it cannot do.

`server/service/errors.py` decides how a client sees them.
"""

import math

from crma.core.errors import CrmaError


class EngineError(CrmaError):
    """Base of the errors that an engine raises."""


class QueueFull(EngineError):
    """The bounded queue is full.

    Args:
        limit: sequences that may wait.
        retry_after: an estimate of when there will be room, in seconds.

    Attributes:
        seconds: the estimate as clients are told it, in whole seconds, at least 1.
    """

    def __init__(self, limit: int, retry_after: float) -> None:
        self.seconds = max(1, math.ceil(retry_after))
        message = f"the queue is full ({limit} sequences); try again in {self.seconds} s"
        super().__init__(message, allowed=limit)
        self.retry_after = retry_after


class EngineStopped(EngineError):
    """The engine is draining or has failed, and takes no new requests."""


class PromptTooLong(EngineError):
    """Prompt and max_tokens do not fit the model's context together.

    Clients of OpenAI look for the words "maximum context length is N tokens", and read N.

    Args:
        num_prompt_tokens: the length of the prompt.
        max_tokens: the most tokens that were to be generated.
        max_model_len: the limit on both together.
    """

    def __init__(self, num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
        message = (
            f"This model's maximum context length is {max_model_len} tokens. "
            f"However, you requested {num_prompt_tokens + max_tokens} tokens "
            f"({num_prompt_tokens} in the prompt, {max_tokens} in the completion)."
        )
        allowed = f"prompt tokens + max_tokens <= {max_model_len}"
        super().__init__(message, field="prompt", value=num_prompt_tokens, allowed=allowed)


class UnsupportedRequest(EngineError):
    """A request that this engine would not answer as it asks; another engine may."""


class InvalidConstraint(EngineError):
    """A constraint on an answer that is no valid one, or too large."""


class ConstraintStuck(EngineError):
    """A request that ran, and cannot go on under the constraint that it set."""


class AdapterInUse(EngineError):
    """An adapter that requests use, or that an administrator has pinned, cannot be unloaded."""


class AdapterPoolFull(EngineError):
    """An adapter does not fit into the pool beside those that are pinned or in use."""
