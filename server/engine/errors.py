"""Errors of an engine: requests that it refuses, and operations on adapters that it cannot do.

`server/service/errors.py` decides how a client sees them.
"""

from crma.core.errors import CrmaError


class EngineError(CrmaError):
    """Base of the errors that an engine raises."""


class QueueFull(EngineError):
    """The bounded queue is full.

    Args:
        limit: sequences that may wait.
        retry_after: an estimate of when there will be room, in seconds.
    """

    def __init__(self, limit: int, retry_after: float) -> None:
        message = f"the queue is full ({limit} sequences); try again in {retry_after:.0f} s"
        super().__init__(message, allowed=limit)
        self.retry_after = retry_after


class EngineStopped(EngineError):
    """The engine is draining or has failed, and takes no new requests."""


class PromptTooLong(EngineError):
    """Prompt and max_tokens do not fit the model's context or the KV cache together."""


class AdapterInUse(EngineError):
    """An adapter that requests use, or that an administrator has pinned, cannot be unloaded."""


class AdapterPoolFull(EngineError):
    """An adapter does not fit into the pool beside those that are pinned or in use."""
