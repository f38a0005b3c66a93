"""The audit log: a line for each act of an administrator, done or refused."""

import json
import logging
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError
from crma.core.files import PRIVATE

log = logging.getLogger("server")
lines = logging.getLogger("server.audit")


@dataclass
class Act:
    """What somebody did.

    Args:
        who: name of the caller.
        what: the act, as a verb.
        about: what it was done to: names, versions, digests. Values that are None are left out.
        result: "done", or the code of the error that it was answered with.
    """

    who: str
    what: str
    about: dict[str, Any] = field(default_factory=dict)
    result: str = "done"


@dataclass(frozen=True)
class Audit:
    """Writes acts to the log, and to a file as JSON Lines that only its owner can read.

    The file is opened for each act, so that it may be moved away at any time.

    Args:
        file: None: the log only.
    """

    file: Path | None

    def check(self) -> None:
        """Raises ConfigError if the file cannot be written."""
        if self.file is not None:
            try:
                os.close(self._open(self.file))
            except OSError as error:
                reason = error.strerror or type(error).__name__
                message = f"{self.file} cannot be written: {reason}"
                raise ConfigError(message, field="audit_log") from error

    def write(self, act: Act) -> None:
        """Write one act. It is done by now, so a file that fails is only an error of the log."""
        about = {name: value for name, value in act.about.items() if value is not None}
        fields = {"who": act.who, **about, "result": act.result}
        lines.info("%s", act.what, extra={"fields": fields})
        if self.file is None:
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "what": act.what, **fields}) + "\n"
        try:
            descriptor = self._open(self.file)
            try:
                os.write(descriptor, line.encode())  # one write: lines of two servers do not mix
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            log.error("%s: %r is not in the audit log: %s", self.file, act.what, error)

    def _open(self, file: Path) -> int:
        # O_NONBLOCK: a named pipe that nobody reads is an error, instead of a wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(file, flags | os.O_CLOEXEC, PRIVATE)
