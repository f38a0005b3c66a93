"""The server as its users start it: a process on a free port."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

from paths import ROOT, STORE


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
        assert any(" ready: " in line for line in server.stderr)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
