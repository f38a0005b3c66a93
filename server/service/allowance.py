"""So much a minute."""

from dataclasses import dataclass

SECONDS = 60.0


@dataclass
class Allowance:
    """A token bucket (Turner 1986): it fills evenly, up to what a minute gives.

    What is spent may be more than there is, because a request's tokens are known only at its end.
    The debt is paid by waiting, so that a mean over time is never over the limit.

    Args:
        per_minute: how much comes in a minute.
        now: seconds of a clock that never goes back, here and below.
    """

    per_minute: int
    now: float

    def __post_init__(self) -> None:
        self._left = float(self.per_minute)

    def spend(self, amount: float, now: float) -> None:
        """Take away an amount."""
        self._fill(now)
        self._left -= amount

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so much is there; 0 if it is."""
        self._fill(now)
        missing = max(0.0, amount - self._left)
        return missing * SECONDS / self.per_minute

    def _fill(self, now: float) -> None:
        came = (now - self.now) * self.per_minute / SECONDS
        self._left = min(float(self.per_minute), self._left + came)
        self.now = now
