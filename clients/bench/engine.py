"""What is measured: our server, PEFT and transformers, other servers."""

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import httpx

from bench import load
from bench.latency import Answer
from bench.load import Workload

LORAS = tuple(f"lora-{i}" for i in range(8))


@dataclass(frozen=True)
class Engine:
    """What answers a workload; `pid` None: not ours, its process is not looked at."""

    run: Callable[[Workload, str], tuple[list[Answer], float]]
    models: frozenset[str]
    pid: int | None = None

    def rss_mib(self) -> float | None:
        """Resident memory of the process (Linux)."""
        found = self.pid and re.search(
            r"VmRSS:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text()
        )
        return int(found[1]) / 1024 if found else None


def running(url: str, pid: int | None = None) -> Engine:
    """The server at `url`, with the models that it lists."""
    models = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]
    return Engine(partial(load.run, url), frozenset(model["id"] for model in models), pid)


@contextmanager
def serving(settings: Mapping[str, str], log: Path) -> Iterator[tuple[Engine, float]]:
    """`python -m server` with these environment variables, once it is ready, and how many seconds that took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        "env",
        f"CRMA_PORT={port}",
        *map("=".join, settings.items()),
        sys.executable,
        "-m",
        "server",
    ]
    with log.open("w") as file, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        start, ready = time.perf_counter(), False
        process = subprocess.Popen(command, stdout=file, stderr=file)
        try:
            while not ready:
                if process.poll() is not None:
                    raise SystemExit(f"the server ended before it was ready:\n{log.read_text()}")
                with suppress(httpx.TransportError):
                    ready = client.get("/readyz").is_success
                time.sleep(0.02)
            took = time.perf_counter() - start
            yield running(f"http://127.0.0.1:{port}", process.pid), took
        finally:
            process.terminate()
            process.wait()


@contextmanager
def peers(
    model: str, folder: Path
) -> Iterator[tuple[Engine, Callable[[], dict[str, float | None]]]]:
    """PEFT and transformers (`peers.py`), and what measures the machine's limits; the adapters are in `folder` then."""
    command = [sys.executable, str(Path(__file__).with_name("peers.py")), model, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        jobs, results = cast(IO[str], process.stdin), cast(IO[str], process.stdout)
        results.readline()  # by now the adapters are written

        def ask(job: Sequence[object]) -> Any:
            jobs.write(json.dumps(job) + "\n")
            jobs.flush()
            if not (line := results.readline()):
                raise SystemExit("the peers ended in the middle of a job")
            return json.loads(line)

        def run(workload: Workload, seed: str) -> tuple[list[Answer], float]:
            answers, wall = ask(
                (workload.requests(seed), workload.concurrency, workload.new_tokens)
            )
            return [Answer(**answer) for answer in answers], wall

        try:
            yield Engine(run, frozenset({"base", *LORAS}), process.pid), lambda: ask(())
        finally:
            process.terminate()  # it may be in the middle of a job
