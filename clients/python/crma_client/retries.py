"""Whether and when a request is sent again. Nothing here waits or uses the network."""

import random
from dataclasses import dataclass

import httpx

from crma_client.errors import ConnectionFailed, CrmaClientError, StatusError, TimedOut

NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""What httpx raises before it has sent anything."""

NOT_RUN = frozenset({"draining", "loading", "not_ready", "too_many_connections"})
"""Codes of a 503 that a server answers before it runs anything. `server_stopped` is none of them:
that request had begun."""

PASSING = frozenset({429, 502, 503, 504})
"""Statuses after which reading again may succeed."""


@dataclass(frozen=True)
class Retries:
    """How often and how fast a client tries again.

    Args:
        max_retries: most attempts after the first; 0: none.
        first_wait_s: about how long it waits before the first of them; twice as long before the
            next.
        max_wait_s: the longest wait. A server that asks for more is not asked again.
    """

    max_retries: int
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0

    def wait(self, attempt: int, method: str, error: CrmaClientError) -> float | None:
        """Seconds to wait before a request is sent again; None: it must not be.

        Args:
            attempt: how many attempts failed before this one.
            method: of the request.
            error: why the attempt failed.
        """
        if attempt >= self.max_retries or not _may_repeat(method, error):
            return None
        if error.retry_after is not None:
            # Never sooner, and not all clients at once.
            wait = error.retry_after + random.uniform(0, self.first_wait_s)
            return wait if error.retry_after <= self.max_wait_s else None
        longest = min(self.max_wait_s, self.first_wait_s * 2**attempt)
        return random.uniform(longest / 2, longest)


def _may_repeat(method: str, error: CrmaClientError) -> bool:
    """Whether nothing has run, or what has run only reads."""
    if isinstance(error.__cause__, NOT_SENT):
        return True
    if isinstance(error, StatusError):
        is_refused = error.status == 429 or (error.status == 503 and error.code in NOT_RUN)
        return is_refused or (method == "GET" and error.status in PASSING)
    broke = isinstance(error, ConnectionFailed) and not isinstance(error, TimedOut)
    return broke and method == "GET"
