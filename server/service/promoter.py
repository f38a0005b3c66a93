"""Promotions of a backbone: the gate, as `crma store promote` runs it, in a process of its own.

So it has the very rules of that command. It loads the base model again, beside the engine, whose
threads and memory it leaves alone. One runs at a time, and is kept until the next or the end of the
server. What it decided is in the history of the store for good.
"""

import asyncio
import json
import logging
import shutil
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from server.service.errors import PromotionRuns
from server.service.registry import Registry

log = logging.getLogger("server")

COMMAND = (sys.executable, "-m", "crma", "store", "promote")
MAX_LINES = 200
MAX_LINE_BYTES = 2**20
NICENESS = "19"  # requests go first


@dataclass(frozen=True)
class Candidate:
    """A version of the backbone, and how much a task may suffer from it; see `crma store promote`.

    Args:
        version: of the backbone.
        dry_run: decide, and change nothing.
        margin: the share of its loss by which a serving task may get worse.
        newcomer_margin: the same for a task that nobody uses yet.
        allow_ungated: names of tasks that need not be scored.
    """

    version: str
    dry_run: bool
    margin: float
    newcomer_margin: float
    allow_ungated: Sequence[str]

    def arguments(self) -> list[str]:
        """The command line."""
        line = [self.version, "--json", f"--margin={self.margin}"]
        line.append(f"--newcomer-margin={self.newcomer_margin}")
        line += [f"--allow-ungated={name}" for name in self.allow_ungated]
        return [*line, "--dry-run"] if self.dry_run else line


@dataclass
class Promotion:
    """A run of the gate.

    Attributes:
        candidate: what it decides about.
        started: UTC, ISO 8601.
        status: how far it is.
        lines: the last of what it said while it ran.
        evidence: what it decided, and why; None unless it is done.
        error: why it failed.
    """

    candidate: Candidate
    started: str
    status: Literal["running", "done", "failed", "cancelled"] = "running"
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=MAX_LINES))
    evidence: dict[str, Any] | None = None
    error: str | None = None

    def end(self, code: int, printed: bytes) -> None:
        """Read how the command ended: with its evidence, or with a last line that says why not."""
        try:
            self.evidence = json.loads(printed)
        except ValueError:
            said = self.lines[-1] if self.lines else f"it ended with code {code}"
            self.status, self.error = "failed", said.removeprefix("error: ")
        else:
            self.status = "done"


@dataclass(eq=False)
class Promoter:
    """Runs the gate on the store and the base model of a registry.

    Attributes:
        last: the promotion that runs, or ran last; None: there was none yet.
    """

    registry: Registry
    last: Promotion | None = field(default=None, init=False)
    _running: asyncio.Task[None] | None = field(default=None, init=False)

    def start(self, candidate: Candidate) -> Promotion:
        """Begin with a candidate.

        Raises:
            PromotionRuns: another one runs.
            NotFound, StoreError: there is no such version, or it is damaged.
        """
        if self._running is not None and not self._running.done():
            message = "a promotion runs already: wait for it, or cancel it"
            raise PromotionRuns(message, field="version", value=candidate.version)
        self.registry.backbone_version(candidate.version, "version")
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self.last = Promotion(candidate, started)
        self._running = asyncio.create_task(self._run(self.last))
        return self.last

    async def stop(self) -> None:
        """End what runs. Nothing has changed then: the command changes the store in one write."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        if self.last is not None and self.last.status == "running":  # cancelled before it began
            self.last.status = "cancelled"

    async def _run(self, promotion: Promotion) -> None:
        """The command, from its start to its end, however it ends."""
        try:
            code, printed = await self._command(promotion)
        except asyncio.CancelledError:
            promotion.status = "cancelled"
            raise
        except Exception:
            log.exception("the gate cannot be run")
            promotion.status = "failed"
            promotion.error = "the server cannot run the gate; its log has the reason"
            return
        try:
            if not promotion.candidate.dry_run:
                await self.registry.refresh()  # who sees the end, sees what serves
        finally:
            promotion.end(code, printed)

    async def _command(self, promotion: Promotion) -> tuple[int, bytes]:
        """Run it. Returns its exit code, and what it printed."""
        arguments = promotion.candidate.arguments()
        registry = self.registry
        place = ("--store", str(registry.store.root), "--model", str(registry.base.path))
        process = await asyncio.create_subprocess_exec(
            *_yielding(),
            *COMMAND,
            *arguments,
            *place,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=PIPE,
            limit=MAX_LINE_BYTES,
        )
        try:
            printed, _ = await asyncio.gather(_printed(process), _follow(process, promotion))
            return await process.wait(), printed
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def _yielding() -> tuple[str, ...]:
    """What a command line begins with that yields to others, where the system can do that."""
    nice = shutil.which("nice")
    return () if nice is None else (nice, "-n", NICENESS)


async def _printed(process: Process) -> bytes:
    assert process.stdout is not None
    return await process.stdout.read()


async def _follow(process: Process, promotion: Promotion) -> None:
    """Keep what the command says while it runs."""
    assert process.stderr is not None
    async for line in process.stderr:
        text = line.decode("utf-8", "replace").rstrip()
        if text:
            promotion.lines.append(text.rpartition("\r")[2])
