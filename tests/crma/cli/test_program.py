"""Commands that become another program: `crma serve` and `crma bench`."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from command_line import crma
from paths import ROOT

from crma.cli import bench
from crma.cli.program import options
from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore


def test_options_are_written_as_a_shell_would_take_them() -> None:
    given = {"store": Path("a b"), "port": 1, "allow_open": True, "json": False, "host": None}
    assert options(given) == ["--store", "a b", "--port", "1", "--allow-open"]


@contextmanager
def serving(*arguments: object, **settings: str) -> Iterator[subprocess.Popen[str]]:
    """`crma serve` as a process, which is stopped at the end."""
    command = [sys.executable, "-m", "crma", "serve", *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


@pytest.mark.e2e
def test_a_server_takes_its_options_before_its_variables(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    """And a signal to the command is a signal to the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"CRMA_EVALUATIONS": str(tmp_path / "kept"), "CRMA_DTYPE": "float32"}
    settings |= {"CRMA_PORT": "1", "CRMA_DRAIN_GRACE_S": "0", "CRMA_KERNEL": "off"}
    arguments = ("--store", store.root, "--model", base.path, "--port", port, "--device", "cpu")
    with serving(*arguments, "--json", **settings) as process:
        assert process.stderr is not None
        said = (json.loads(line)["message"] for line in iter(process.stderr.readline, ""))
        assert any("ready" in message for message in said)
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
        process.terminate()
        assert process.wait(30) == 0
        assert process.stdout is not None
        assert process.stdout.read() == ""


@pytest.mark.e2e
def test_a_server_that_cannot_start_says_why_in_a_line(tmp_path: Path) -> None:
    with serving("--store", tmp_path / "typo", "--quiet") as process:
        assert process.stderr is not None
        assert str(tmp_path / "typo") in process.stderr.read()
        assert process.wait(30) == 2


def test_a_benchmark_without_a_checkout_says_that_it_needs_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CLIENTS", tmp_path)
    code, _, err = crma("bench")
    assert (code, "needs a checkout" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--server", "wrong"], "must be NAME=URL, not 'wrong'"),
        (["--rows", "base,wrong"], "there is no wrong; there are start, mixed, base"),
    ],
)
def test_a_benchmark_is_that_of_the_checkout(arguments: list[str], message: str) -> None:
    command = [sys.executable, "-m", "crma", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
