"""The server as its users start it: a process on a free port; or on a tiny model, by a script."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import tiny
from paths import ROOT, STORE

from crma.models.model_shape import read_shape
from crma.models.serving_record import read_served


@contextmanager
def running_server(*, max_descriptors: int | None = None, **settings: str) -> Iterator[str]:
    """Run a server in fp32 on the shipped store.

    Args:
        max_descriptors: how many it may have; None: as many as this process.
        settings: environment variables beside these.

    Yields:
        Its address, once it is ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = {"CRMA_PORT": port, "CRMA_DTYPE": "float32", "CRMA_STORE": str(STORE)}
    command = [sys.executable, "-m", "server"]
    if max_descriptors is not None:
        command = ["prlimit", f"--nofile={max_descriptors}", *command]
    with (
        TemporaryDirectory() as kept,
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | own | {"CRMA_EVALUATIONS": kept} | settings,
            stderr=subprocess.PIPE,
            text=True,
        ) as server,
    ):
        assert server.stderr is not None
        shown = []
        while not shown or " ready: " not in shown[-1]:
            shown.append(server.stderr.readline())
            assert shown[-1], "the server has ended:\n" + "".join(shown[-30:])
        threading.Thread(target=server.stderr.read, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


class Process(NamedTuple):
    """A server as a process, and where it listens."""

    server: subprocess.Popen[str]
    address: str


@contextmanager
def running_script(
    script: str, *arguments: str, tmp_path: Path, family: str = "llama", **settings: str
) -> Iterator[Process]:
    """A server on a tiny model of a family, started by a script that calls `main`."""
    base = tiny.pulled_base(tmp_path, family)
    read_shape(base)
    read_served(base)  # both as `crma pull` does
    store = tiny.filled_store(tmp_path / "store", base, family)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "CRMA_HOME": str(tmp_path / "home"),
        "CRMA_MODEL": "tiny",
        "CRMA_STORE": str(store.root),
        "CRMA_PORT": str(port),
        "CRMA_DTYPE": "float32",
        "CRMA_KERNEL": "off",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        env={**os.environ, **own, **settings},
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield Process(server, f"http://127.0.0.1:{port}")
        finally:
            server.kill()
