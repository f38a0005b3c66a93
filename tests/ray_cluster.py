"""Servers on Ray as their users start them: processes, on a cluster of this machine."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import pytest
import tiny
import yaml

from crma.models.base_model import BaseModel, find_base
from crma.store.adapter_store import AdapterStore

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install 'crma-server[ray]'",
)
START_SECONDS = 240.0
ENGINE = "ray::ServeReplica:crma:engine"
TASKS = ("medical", "legal")
LONG = 300  # tokens
RESOURCES = {"num_cpus": 0.5, "ingress_cpus": 0, "cluster_cpus": 2, "object_store_mib": 100}


@dataclass
class Cluster:
    """A server on replicas.

    process: what started the replicas. address: where it listens. folder: has all that it needs.
    """

    process: subprocess.Popen[bytes]
    address: str
    folder: Path

    def __post_init__(self) -> None:
        headers = {"Authorization": "Bearer admin"}
        self.client = httpx.Client(base_url=self.address, timeout=120, headers=headers)

    @property
    def base(self) -> BaseModel:
        """The tiny model that it serves."""
        return find_base("tiny", home=self.folder / "home")

    @property
    def store(self) -> AdapterStore:
        """The store of the tiny model."""
        return AdapterStore(self.folder / "store")

    def generate(self, **body: Any) -> dict[str, Any]:
        response = self.client.post("/generate", json={"raw": True, "ignore_eos": True, **body})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def measured(self, name: str) -> list[float]:
        """The values of all series of a metric, without its prefix."""
        found = re.findall(
            rf"^crma_{name}(?:{{.*}})? (\S+)$", self.client.get("/metrics").text, re.M
        )
        return [float(value) for value in found]

    def value(self, name: str) -> float:
        """The value of a metric that has one series."""
        (value,) = self.measured(name)
        return value

    def wait_until(self, metric: str, *values: float) -> None:
        until = time.monotonic() + START_SECONDS
        while self.measured(metric) != list(values):
            assert time.monotonic() < until, f"{metric} is {self.measured(metric)}"

    def wait_until_ready(self) -> None:
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            assert self.process.poll() is None, "the server has ended"
            try:
                if self.client.get("/readyz").status_code == 200:
                    return
            except httpx.HTTPError:
                self.process.poll()
        raise TimeoutError("the server is not ready")

    def engines(self) -> list[int]:
        """The process ids of the replicas."""
        return [each for each in descendants(self.process.pid) if name_of(each).startswith(ENGINE)]


def name_of(process: int) -> str:
    """What a process calls itself; empty: it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


def descendants(process: int) -> list[int]:
    """A process, those that it has started, and those that they have."""
    parents: dict[int, int] = {}
    for each in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        parents[int(each)] = int(fields[1])
    found = [process]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def tiny_settings(folder: Path) -> dict[str, Any]:
    """Settings of a server on a tiny model, which is pulled into a folder, with a store there."""
    base = tiny.pulled_base(folder)
    store = tiny.filled_store(folder / "store", base)
    return {
        **{"home": str(folder / "home"), "model": base.name, "store": str(store.root)},
        **{"device": "cpu", "dtype": "float32", "kernel": "off", "num_threads": 1},
        **{"admin_key": "admin", "evaluations": str(folder / "evaluations")},
        **{"max_model_len": 400, "log_format": "json"},
    }


@contextmanager
def running(folder: Path, settings: Mapping[str, Any], **config: Any) -> Iterator[Cluster]:
    """A server on replicas, on a cluster of its own; it is ready.

    Args:
        folder: of the configuration.
        settings: of the server, but for the port.
        config: keys of `ReplicasConfig`, beside RESOURCES.
    """
    port = free_port()
    file = folder / "replicas.yaml"
    written = {**RESOURCES, **config, "settings": {**settings, "port": port}}
    file.write_text(yaml.safe_dump(written))
    command = [sys.executable, "-m", "server.ray", str(file)]
    with subprocess.Popen(command, cwd=folder) as process:
        served = Cluster(process, f"http://127.0.0.1:{port}", folder)
        try:
            served.wait_until_ready()
            yield served
        finally:
            served.client.close()
            process.send_signal(signal.SIGTERM)
            process.wait(120)


class Load:
    """Clients that ask again and again while the block runs, every second one for a stream.

    Args:
        num_clients: at once.
        body: of every request. A client asks for the base model, or for one of TASKS.

    Attributes:
        endings: how many requests ended how, by "whole" or "stream", and "done" or the code of
            an error.
    """

    def __init__(self, cluster: Cluster, num_clients: int, **body: Any) -> None:
        self.endings: Counter[tuple[str, str]] = Counter()
        self._cluster = cluster
        self._body = {"prompt": "one", "raw": True, "ignore_eos": True, **body}
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def num_ended(self, form: str) -> int:
        """How many requests for a form have ended, in any way."""
        return sum(count for (each, _), count in self.endings.items() if each == form)

    def _ask(self, number: int) -> None:
        form = ("whole", "stream")[number % 2]
        task = (None, *TASKS)[number // 2 % 3]
        body = {**self._body, "task": task, "stream": form == "stream"}
        while not self._ended.is_set():
            response = self._cluster.client.post("/generate", json=body)
            self.endings[form, _ending(response)] += 1


def _ending(response: httpx.Response) -> str:
    """The code of the error that a request ended with; "done" if there is none."""
    if response.status_code != 200:
        return str(response.json()["error"]["code"])
    if not response.headers["content-type"].startswith("text/event-stream"):
        return "done"
    name, data = response.text.split("\n\n")[-2].splitlines()[-2:]
    return "done" if name == "event: done" else str(json.loads(data[6:])["error"]["code"])
