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
from bench.metrics import RequestResult
from bench.workloads import LORAS, Workload


@dataclass(frozen=True)
class Engine:
    """Something that answers a workload.

    Args:
        run: takes a workload and a seed; returns the results and the seconds they took.
        models: the models it can serve.
        pid: its process; None if the benchmark did not start it.
        kernel: the class of processors that its native kernel is for, "none", or None: unknown.
        dtype: in which it computes, "+int8" with weights of 8 bits; None: unknown.
        is_static: it can serve static workloads only.
    """

    run: Callable[[Workload, str], tuple[list[RequestResult], float]]
    models: frozenset[str]
    pid: int | None = None
    kernel: str | None = None
    dtype: str | None = None
    is_static: bool = False

    def can_serve(self, workload: Workload) -> bool:
        """Whether it has every model of the workload, and can do that kind."""
        has_models = workload.base_models() <= self.models
        return has_models and (workload.is_static or not self.is_static)

    def details(self) -> dict[str, str | None]:
        """What its rows say about it."""
        return {"kernel": self.kernel, "dtype": self.dtype}

    def rss_mib(self) -> float | None:
        """Resident memory of the process in MiB (Linux); None if there is no process to look at."""
        if self.pid is None:
            return None
        status = Path(f"/proc/{self.pid}/status").read_text()
        resident = re.search(r"VmRSS:\s+(\d+)", status)
        return int(resident[1]) / 1024 if resident else None


def connect(url: str, pid: int | None = None, kernel: str | None = None) -> Engine:
    """The running server at `url`, with the models that it lists."""
    models = httpx.get(f"{url}/v1/models").raise_for_status().json()["data"]
    names = frozenset(model["id"] for model in models)
    return Engine(partial(load.run, url), names, pid, kernel, _dtype(url))


def _dtype(url: str) -> str | None:
    """What one of our servers says it computes in; others do not have the route."""
    answer = httpx.get(f"{url}/adapters")
    if not answer.is_success:
        return None
    dtype: str = answer.json()["base"]["dtype"]
    return dtype


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
            yield connect(url, process.pid, _kernel(log)), seconds
        finally:
            process.terminate()
            process.wait()


def _kernel(log: Path) -> str:
    """Which kernel a server that is ready says in its log that it has."""
    found = re.search(r"(?<!no )native kernel: (\w+)", log.read_text())
    return found[1] if found else "none"


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
        dtype = self._answers.readline().strip()  # comes once the adapters are written
        if not dtype:
            raise SystemExit("peers.py ended before it was ready")
        self.engine = Engine(
            self._run, frozenset({"base", *LORAS}), process.pid, "none", dtype, is_static=True
        )

    def _run(self, workload: Workload, seed: str) -> tuple[list[RequestResult], float]:
        requests = [(one.model, one.prompt) for one in workload.requests(seed)]
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
def start_peers(model: str, folder: Path, num_adapters: int) -> Iterator[Peers]:
    """Run `peers.py` for the block; it has written its adapters into `folder` before.

    Args:
        model: folder of the base model.
        folder: where the adapters are written.
        num_adapters: how many.
    """
    command = [sys.executable, "-m", "bench.peers", model, str(folder), str(num_adapters)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Peers(process)
        finally:
            process.terminate()  # it may be in the middle of a job
