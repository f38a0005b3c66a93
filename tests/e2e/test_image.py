"""The image, built step by step in chroots and started as compose.yaml does: read-only, no root."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dockerfile import Dockerfile
from image import USER_ID, Image, enter, environment, make_base

from crma.core.cache import cache_home

NEEDED = ("debootstrap", "unshare", "chroot")
EXTRAS = (  # what the server imports once a setting asks for it
    "model_signing.verifying",
    "psycopg",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
)
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "as", "ld", "make")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, NEEDED)),
        reason=f"needs root and {', '.join(NEEDED)}",
    ),
]


@dataclass
class Container:
    """A started image. log: what it has written to standard error."""

    root: Path
    volume: Path
    variables: dict[str, str]
    process: subprocess.Popen[str]
    log: list[str]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does."""
        argv = enter(self.root, command, self.variables, folder="/app", volume=self.volume)
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)

    def ask(self, path: str, body: object = None, key: str = "") -> tuple[int, dict]:
        """Status and body of a request."""
        address = f"http://127.0.0.1:{self.variables['CRMA_PORT']}{path}"
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    base = request.config.getoption("--image-base")
    if base is None:
        base = make_base(tmp_path_factory.mktemp("debian") / "base")
    built = Image(Path(base), tmp_path_factory.mktemp("stages"))
    try:
        return built.build()
    finally:
        sys.stderr.write("\n".join(["", *built.report, ""]))


@pytest.fixture(scope="module")
def container(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    volume = tmp_path_factory.mktemp("volume")
    models = cache_home() / "models"
    if models.exists():  # what an earlier start has pulled
        shutil.copytree(models, volume / "models")
    for path in (volume, *volume.rglob("*")):
        os.chown(path, int(USER_ID), int(USER_ID))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = environment() | {"CRMA_PORT": port, "CRMA_API_KEYS": "secret"}
    start = Dockerfile.read().stages[-1].command("CMD")
    command = enter(image, start, variables, folder="/app", volume=volume)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        log = []
        for line in process.stderr:
            log.append(line)
            if " ready: " in line:
                break
        else:
            pytest.fail("".join(log))
        reader = threading.Thread(target=log.extend, args=(process.stderr,))
        reader.start()
        yield Container(image, volume, variables, process, log)
        process.terminate()
        reader.join()  # it ends with the process
    assert process.returncode == 0, log[-5:]


def test_it_becomes_healthy_and_serves_those_with_a_key(container: Container) -> None:
    check = Dockerfile.read().stages[-1].command("HEALTHCHECK")
    done = container.run(*check)
    assert done.returncode == 0, done.stderr
    body = {"prompt": "What is a fever?", "task": "medical", "max_tokens": 8}
    assert container.ask("/generate", body)[0] == 401
    status, answer = container.ask("/generate", body, "secret")
    assert status == 200, answer
    assert answer["provenance"]["task"]


def test_it_computes_with_a_prebuilt_kernel_and_has_no_compiler(container: Container) -> None:
    """g++ was in the image, to build the kernel at the first start."""
    maps = Path(f"/proc/{container.process.pid}/maps").read_text()
    assert "/app/server/engine/native/prebuilt/kernel-" in maps
    for name in COMPILERS:
        found = container.run("sh", "-c", f"command -v {name}")
        assert found.returncode == 127 or not found.stdout, found.stdout


def test_it_is_not_root_and_writes_to_its_volume_only(container: Container) -> None:
    assert container.run("id", "-u").stdout.strip() == USER_ID
    for place in ("/app/adapters_store/x", "/app/x", "/tmp/x", "/opt/venv/x", "/home/x"):
        assert container.run("touch", place).returncode != 0, place
    assert container.run("touch", "/var/lib/crma/x").returncode == 0
    status = Path(f"/proc/{container.process.pid}/status").read_text()
    assert f"Uid:\t{USER_ID}\t{USER_ID}" in status


def test_it_keeps_jobs_in_its_volume(container: Container) -> None:
    """Which needs the migrations: they are found by their folder, not by imports."""
    body = {"question_set": "public", "variants": ["base"], "background": True}
    status, started = container.ask("/ablation", body, "secret")
    assert status == 202, started
    kept = container.volume / "evaluations" / "records.sqlite3"
    assert kept.stat().st_mode & 0o777 == 0o600
    status, job = container.ask(f"/ablation/{started['id']}", key="secret")
    assert (status, job["status"]) in [(200, "queued"), (200, "running")], job


def test_all_its_packages_fit_together(container: Container) -> None:
    done = container.run("python", "-m", "pip", "check")
    assert done.returncode == 0, done.stdout
    for module in ("server.app", *EXTRAS):  # whose needs pip may not know of
        done = container.run("python", "-c", f"import {module}")
        assert done.returncode == 0, done.stderr
    assert container.run("crma", "store", "verify").returncode == 0
