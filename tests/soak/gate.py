"""Lets the workers act, holds them while the server is examined or away, and ends them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(eq=False)
class Gate:
    """Where every worker waits before each act.

    A request that the server was killed under may fail: `mark` before it, `was_out_since` after.
    """

    _num_outages: int = 0
    _is_out: bool = False
    _is_open: bool = False
    _is_over: bool = False
    _num_acting: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def open(self) -> None:
        """Let the workers act: the server answers."""
        with self._changed:
            self._is_open = True
            self._is_out = False
            self._changed.notify_all()

    def hold(self) -> None:
        """Let no act begin."""
        with self._changed:
            self._is_open = False

    def wait_until_still(self, patience_s: float) -> None:
        """Wait until no act goes on. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_acting == 0, patience_s):
                raise TimeoutError(f"{self._num_acting} acts go on after {patience_s} s")

    def outage(self) -> None:
        """Hold the workers: the server is about to be killed."""
        with self._changed:
            self._num_outages += 1
            self._is_out = True
            self._is_open = False

    def mark(self) -> int:
        """The beginning of a request, for `was_out_since`."""
        return self._num_outages - self._is_out

    def was_out_since(self, mark: int) -> bool:
        """Whether the server was away since."""
        return self._num_outages > mark

    def end(self) -> None:
        """Let every worker end."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def pause(self, seconds: float) -> None:
        """Wait between two acts, no longer than until the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over, seconds)

    @contextmanager
    def act(self) -> Iterator[bool]:
        """Wait until workers may act. Yields False once all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_open or self._is_over)
            may_act = not self._is_over
            self._num_acting += 1
        try:
            yield may_act
        finally:
            with self._changed:
                self._num_acting -= 1
                self._changed.notify_all()
