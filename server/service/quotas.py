"""How much each key has used of what it may use."""

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from crma.access.key import Limits
from server.service.allowance import Allowance
from server.service.caller import Caller
from server.service.errors import OverQuota

_A_TOKEN = 1.0
_A_REQUEST = 1.0
_LOOK_AGAIN_S = 5.0  # the key may have other limits by then, or be revoked


@dataclass
class _Use:
    """What one key uses. An allowance is None where there is no limit."""

    limits: Limits
    requests: Allowance | None
    tokens: Allowance | None
    num_running: int = 0


class Quotas:
    """The use of every key that has limits, by its name. Only the event loop uses it.

    Args:
        clock: seconds; never goes back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def enter(self, caller: Caller) -> None:
        """Count a request that begins; `leave` must be called when it has ended.

        Raises:
            OverQuota: of requests or tokens, or as many run already. It is not counted.
        """
        use = self._use(caller)
        now = self._clock()
        most = use.limits.max_concurrent
        if most is not None and use.num_running >= most:
            # When one of them ends is not known.
            raise _over(caller, "max_concurrent", most, "requests at once", wait_s=1)
        if use.requests is not None:
            wait_s = use.requests.wait_s(_A_REQUEST, now)
            if wait_s:
                limit = use.requests.per_minute
                raise _over(caller, "requests_per_minute", limit, "requests a minute", wait_s)
        if use.tokens is not None:
            wait_s = use.tokens.wait_s(_A_TOKEN, now)
            if wait_s:
                limit = use.tokens.per_minute
                raise _over(caller, "tokens_per_minute", limit, "tokens a minute", wait_s)
        if use.requests is not None:
            use.requests.spend(_A_REQUEST, now)
        use.num_running += 1

    def leave(self, caller: Caller) -> None:
        """Count the end of a request for which `enter` was called."""
        self._uses[caller.name].num_running -= 1

    def spend(self, caller: Caller, num_tokens: int) -> None:
        """Count tokens of a prompt and its answers.

        They count under the limits that the key has by now, whatever it had when they were asked
        for: old limits that came back would begin a new minute with every request.
        """
        use = self._uses.get(caller.name) or self._use(caller)
        if use.tokens is not None:
            use.tokens.spend(num_tokens, self._clock())

    async def until_tokens(self, current: Callable[[], Caller]) -> None:
        """Wait until a caller may use tokens: for work in the background, which is not refused.

        Args:
            current: the caller, with what its key may do by now. What it raises ends the wait.
        """
        while True:
            tokens = self._use(current()).tokens
            wait_s = 0.0 if tokens is None else tokens.wait_s(_A_TOKEN, self._clock())
            if not wait_s:
                return
            await asyncio.sleep(min(wait_s, _LOOK_AGAIN_S))

    def _use(self, caller: Caller) -> _Use:
        """The use of a caller. New limits begin a new minute; what runs goes on."""
        use = self._uses.get(caller.name)
        if use is None or use.limits != caller.limits:
            now = self._clock()
            limits = caller.limits
            requests = limits.requests_per_minute
            tokens = limits.tokens_per_minute
            use = self._uses[caller.name] = _Use(
                limits,
                None if requests is None else Allowance(requests, now),
                None if tokens is None else Allowance(tokens, now),
                0 if use is None else use.num_running,
            )
        return use


def _over(caller: Caller, field: str, limit: int, what: str, wait_s: float) -> OverQuota:
    """The refusal, whose Retry-After is when the next request will not be refused for it."""
    seconds = max(1, math.ceil(wait_s))
    message = f"key {caller.name!r} has had its {limit} {what}; try again in {seconds} s"
    refusal = OverQuota(message, field=field, allowed=limit)
    refusal.headers = {"Retry-After": str(seconds)}
    return refusal
