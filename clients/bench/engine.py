"""The engines that are measured: our server, PEFT and transformers, and other servers."""

import json
import os
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
from bench.metrics import Metrics, RequestResult
from bench.workloads import LORAS, Workload


@dataclass(frozen=True)
class Engine:
    """Something that answers a workload.

    Args:
        run: takes a workload and a seed; returns the results and the seconds they took.
        models: the models it can serve.
        pid: its process; None if the benchmark did not start it.
    """

    run: Callable[[Workload, str], tuple[list[RequestResult], float]]
    models: frozenset[str]
    pid: int | None = None

    def can_serve(self, workload: Workload) -> bool:
        """Whether it has every model of the workload."""
        return workload.base_models() <= self.models

    def rss_mib(self) -> float | None:
        """Resident memory of the process in MiB (Linux); None if there is no process to look at."""
        if self.pid is None:
            return None
        status = Path(f"/proc/{self.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+)", status)
        return int(resident[1]) / 1024 if resident else None


def connect(url: str, pid: int | None = None) -> Engine:
    """The running server at `url`, with the models that it lists."""
    models = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]
    names = frozenset(model["id"] for model in models)
    return Engine(partial(load.run, url), names, pid)


@contextmanager
def start_server(settings: Mapping[str, str], log: Path) -> Iterator[tuple[Engine, float]]:
    """Run `python -m server` for the block.

    Args:
        settings: environment variables of the server.
        log: file for its output; overwritten.

    Returns:
        The server, ready; and the seconds it took to become so.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, **settings, "CRMA_PORT": str(port)}
    command = [sys.executable, "-m", "server"]
    with log.open("w") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            _wait_until_ready(process, url, log)
            seconds = time.perf_counter() - begin
            yield connect(url, process.pid), seconds
        finally:
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Poll /readyz until it says yes; exit with the server's log if the server ends before."""
    ready = False
    with httpx.Client(base_url=url) as client:
        while not ready:
            if process.poll() is not None:
                raise SystemExit(f"the server ended before it was ready:\n{log.read_text()}")
            with suppress(httpx.TransportError):
                ready = client.get("/readyz").is_success
            time.sleep(0.02)


class Peers:
    """A running `peers.py`, which does one job at a time: PEFT and transformers on a workload."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._jobs = cast(IO[str], process.stdin)
        self._answers = cast(IO[str], process.stdout)
        self.engine = Engine(self._run, frozenset({"base", *LORAS}), process.pid)

    def measure_limits(self) -> Metrics:
        """Measure how fast the machine reads and multiplies, as `peers.measure_limits`."""
        limits: Metrics = self._ask(())
        return limits

    def _run(self, workload: Workload, seed: str) -> tuple[list[RequestResult], float]:
        requests = workload.requests(seed)
        results, duration = self._ask((requests, workload.concurrency, workload.new_tokens))
        return [RequestResult(**result) for result in results], duration

    def _ask(self, job: Sequence[object]) -> Any:
        self._jobs.write(json.dumps(job) + "\n")
        self._jobs.flush()
        answer = self._answers.readline()
        if not answer:
            raise SystemExit("peers.py ended in the middle of a job")
        return json.loads(answer)


@contextmanager
def start_peers(model: str, folder: Path) -> Iterator[Peers]:
    """Run `peers.py` for the block; it has written its adapters into `folder` before.

    Args:
        model: folder of the base model.
        folder: where the adapters are written.
    """
    program = str(Path(__file__).with_name("peers.py"))
    command = [sys.executable, program, model, str(folder)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        cast(IO[str], process.stdout).readline()  # comes once the adapters are written
        try:
            yield Peers(process)
        finally:
            process.terminate()  # it may be in the middle of a job
