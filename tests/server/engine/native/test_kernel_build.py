"""How the native kernel is built."""

import threading
from pathlib import Path

import pytest

from crma.core.files import TEMPORARY_PREFIX, locked
from server.engine.native import kernel_build
from server.engine.native.cpu_class import CpuClass
from server.engine.native.kernel_build import build

COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo 1.0; exit; fi
echo built >> {log}
while [ "$1" != -o ]; do shift; done
touch "$2"
"""


def a_class() -> CpuClass:
    """A class of this test alone: `build` remembers what it built in this process."""
    return CpuClass("new", None, (), frozenset())


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each time the compiler ran, which only makes empty libraries."""
    log = tmp_path / "log"
    compiler = tmp_path / "bin" / "c++"
    compiler.parent.mkdir()
    compiler.write_text(COMPILER.format(log=log))
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(compiler.parent), prepend=":")
    return log


def test_of_servers_that_start_together_one_builds_the_kernel(builds: Path, tmp_path: Path) -> None:
    """Each of two replicas on a machine compiled for itself, on the cores that both wait for."""
    folder = tmp_path / "kernels"
    found: list[Path] = []

    def another_server() -> None:
        found.append(build.__wrapped__(folder, a_class()))

    with locked(folder):
        others = [threading.Thread(target=another_server) for _ in range(2)]
        for each in others:
            each.start()
    for each in others:
        each.join()
    assert builds.read_text() == "built\n"
    assert len(set(found)) == 1
    assert found[0].exists()


def test_what_a_build_left_that_was_killed_is_deleted_by_the_next(
    builds: Path, tmp_path: Path
) -> None:
    left = tmp_path / f"{TEMPORARY_PREFIX}killed"
    left.mkdir()
    (left / "kernel.so").touch()
    assert build.__wrapped__(tmp_path, a_class()).exists()
    assert not left.exists()


def test_a_built_kernel_is_found_in_a_folder_that_cannot_be_written(
    builds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build.__wrapped__(tmp_path, a_class())

    def refuse(_: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(kernel_build, "locked", refuse)
    assert build.__wrapped__(tmp_path, a_class()) == built
