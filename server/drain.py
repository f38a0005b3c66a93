"""How a server stops: it says so, finishes what runs, and ends what takes too long."""

import asyncio
import faulthandler
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from server.service.frontend import Frontend

log = logging.getLogger("server")

END_SECONDS = 5.0  # for requests that were ended to send their last words
CANCEL_SECONDS = 2  # then those that did not are cancelled
CLOSE_SECONDS = 20.0  # for what is left to close once no request runs; then the process ends


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains on SIGTERM or SIGINT; a second signal ends it at once.

    /readyz is 503 from the signal on, and new requests are. The port stays open for
    `drain_grace_s`, so that a load balancer sees it and clients get an answer, and then until
    nothing runs. What runs longer than `drain_timeout_s` is ended, with an answer that says so.

    Args:
        config: its graceful shutdown should take CANCEL_SECONDS.
        frontend: that of the app.

    Attributes:
        has_failed: the engine can run no more requests.
        on_drained: called when no request runs any more, before the app closes.
    """

    def __init__(self, config: uvicorn.Config, frontend: Frontend) -> None:
        super().__init__(config)
        self._frontend = frontend
        self._grace_s = 0.0
        self.has_failed = False
        self.on_drained: Callable[[], None] = lambda: None

    @property
    def exit_code(self) -> int:
        """Of the process."""
        return 1 if self.has_failed else 0

    def fail(self) -> None:
        """End the server, so that its supervisor starts another. May be called in any thread."""
        self.has_failed = True
        self._frontend.draining = True
        self.should_exit = True

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """Start draining; at the second signal, end. Nobody waits at a terminal: SIGINT has no
        grace."""
        name = signal.Signals(sig).name
        if self._frontend.draining:
            log.warning("%s: the second signal, ending at once", name)
            os._exit(128 + sig)
        log.info("%s: draining", name)
        if sig == signal.SIGTERM:
            self._grace_s = self._frontend.settings.drain_grace_s
        self._frontend.draining = True
        self.should_exit = True

    async def main_loop(self) -> None:
        """Serve until told to stop, then until drained. The port is open all the time."""
        await super().main_loop()
        started = time.monotonic()
        while not self._has_drained(time.monotonic() - started):
            await asyncio.sleep(0.1)
            await self.on_tick(0)  # which keeps the Date of answers right
        if self.server_state.tasks:
            num_running = len(self.server_state.tasks)
            log.warning("%d requests run after CRMA_DRAIN_TIMEOUT_S, and are ended", num_running)
            await self._end_requests()
        self.on_drained()

    def end_process_in_time(self) -> None:
        """End the process in CLOSE_SECONDS even if a thread hangs.

        Python waits for its threads, and one that reads a file system that has gone never ends.
        """

        def end() -> None:
            log.error("after %g s more, threads that hang are left behind", CLOSE_SECONDS)
            faulthandler.dump_traceback()
            os._exit(self.exit_code)

        timer = threading.Timer(CLOSE_SECONDS, end)
        timer.daemon = True
        timer.start()

    def _has_drained(self, seconds: float) -> bool:
        """Whether to stop now, that long after the signal."""
        if seconds < self._grace_s:
            return False
        return not self.server_state.tasks or seconds >= self._frontend.settings.drain_timeout_s

    async def _end_requests(self) -> None:
        """End every request of the engine, and let their answers leave."""
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._frontend.stop()
                while self.server_state.tasks:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            log.warning("%d requests are cancelled", len(self.server_state.tasks))
