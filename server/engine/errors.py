"""What the engine refuses, or cannot do. `server/errors.py` says what a client sees of it."""

from crma.core.errors import CrmaError


class EngineError(CrmaError):
    """Base of what `AsyncEngine.submit` raises before any output exists."""


class QueueFull(EngineError):
    """The bounded queue is full; `retry_after` is an estimate in seconds."""

    def __init__(self, limit: int, retry_after: float) -> None:
        message = (
            f"the queue holds its limit of {limit} sequences; try again in {retry_after:.0f} s"
        )
        super().__init__(message, allowed=limit)
        self.retry_after = retry_after


class EngineStopped(EngineError):
    """The engine is draining or has failed and takes no new requests."""


class PromptTooLong(EngineError):
    """prompt + max_tokens cannot fit the model's context or the KV cache."""


class AdapterInUse(EngineError):
    """An adapter that requests use, or that an administrator holds, cannot be unloaded."""


class AdapterPoolFull(EngineError):
    """No room, now or ever: over the limits beside what is in use or held by an administrator."""
