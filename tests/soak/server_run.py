"""A server process that is killed and started again on the same port, store and records."""

import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
from paths import ROOT
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 240.0


def free_port() -> int:
    """A port that nothing listens on, below those that connections get."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as candidate, suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port


@dataclass(eq=False)
class ServerRun:
    """A server, its logs, and what the system knows of its process.

    Args:
        folder: gets a log for each life.
        settings: environment variables.

    Attributes:
        starts_s: how long each start took, until the server was ready.
    """

    folder: Path
    settings: dict[str, str]
    port: int = field(default_factory=free_port)
    starts_s: list[float] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start it and wait until it is ready."""
        started = time.monotonic()
        environment = os.environ | {"CRMA_PORT": str(self.port)} | self.settings
        command = [sys.executable, "-m", "server"]
        with (self.folder / f"server-{len(self.starts_s)}.log").open("wb") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=log)
        self.wait_for(self.is_ready)
        self.starts_s.append(time.monotonic() - started)

    def is_ready(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """End it as a crash does: no handler runs."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as an operator does. Returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def end(self) -> None:
        """Leave no process behind, whatever has happened."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def wait_for(self, condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        """Ask until a condition holds. Raises TimeoutError."""
        until = time.monotonic() + patience_s
        while not condition():
            if time.monotonic() > until:
                raise TimeoutError(f"not within {patience_s} s: {condition}")
            time.sleep(0.1)

    def resident_mib(self) -> float:
        """Resident memory of the process."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise ProcessLookupError(self.pid)

    def descriptors(self) -> Counter[str]:
        """Its open descriptors by kind: sockets, pipes, …, and each file by its name."""
        kinds: Counter[str] = Counter()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                kinds[os.readlink(link).split(":[")[0]] += 1
        return kinds

    def gauges(self, headers: dict[str, str]) -> dict[str, float]:
        """The metrics without labels, by name."""
        text = httpx.get(f"{self.url}/metrics", headers=headers, timeout=30).text
        values = {}
        for family in text_string_to_metric_families(text):
            values.update({each.name: each.value for each in family.samples if not each.labels})
        return values

    def complaints(self) -> list[str]:
        """Lines of all logs that report a fault of the server."""
        found = []
        for log in sorted(self.folder.glob("server-*.log")):
            lines = log.read_text(errors="replace").splitlines()
            found += [line for line in lines if " ERROR " in line or "Traceback" in line]
        return found
