"""Ends the process when a step hangs: its supervisor then starts another one."""

import faulthandler

STDERR = 2  # the descriptor: it works even where sys.stderr has been replaced


class StepWatchdog:
    """Watches that each pass of a step ends in time. Only one in a process can be armed.

    It is faulthandler's, which runs outside Python: it works although a step is stuck in native
    code that holds the interpreter's lock. It writes the stacks of all threads to standard error
    and ends the process at once, with exit code 1.

    Args:
        limit_s: how long a pass may take, in seconds; 0: for ever. So it is where Python has been
            built without this part of faulthandler.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s if hasattr(faulthandler, "dump_traceback_later") else 0.0

    def arm(self) -> None:
        """A pass begins, and the time for it."""
        if self.limit_s:
            faulthandler.dump_traceback_later(self.limit_s, exit=True, file=STDERR)

    def disarm(self) -> None:
        """The step has ended."""
        if self.limit_s:
            faulthandler.cancel_dump_traceback_later()
