"""Ends the process when a step hangs: its supervisor then starts another one."""

import faulthandler
import time

STDERR = 2  # the descriptor: it works even where sys.stderr has been replaced
SPARE = 0.1  # of the time limit


class StepWatchdog:
    """Watches that each pass of a step ends in time. Only one in a process can be armed.

    It is faulthandler's, which runs outside Python: it works although a step is stuck in native
    code that holds the interpreter's lock. It writes the stacks of all threads to standard error
    and ends the process at once, with exit code 1.

    To arm faulthandler starts a thread, which takes as long as a tenth of a short step's products.
    So it gets a little more time than a pass may take, and most passes begin within that.

    Args:
        limit_s: how long a pass may take at least, in seconds, and a tenth more at most; 0: for
            ever. So it is where Python has been built without this part of faulthandler.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s if hasattr(faulthandler, "dump_traceback_later") else 0.0
        self._armed_until = 0.0  # a pass that begins before has its full time; 0: not armed

    def arm(self) -> None:
        """A pass begins, and the time for it."""
        if not self.limit_s:
            return
        now = time.monotonic()
        if now >= self._armed_until:
            spare_s = SPARE * self.limit_s
            faulthandler.dump_traceback_later(self.limit_s + spare_s, exit=True, file=STDERR)
            self._armed_until = now + spare_s

    def disarm(self) -> None:
        """There is nothing to run."""
        if self._armed_until:
            faulthandler.cancel_dump_traceback_later()
            self._armed_until = 0.0
