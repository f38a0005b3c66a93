"""A private PostgreSQL: a cluster in a temporary folder, reached by a Unix socket only."""

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest


@contextmanager
def running_postgresql() -> Iterator[str]:
    """Start a cluster that ends with the block. Skips the test where PostgreSQL is not installed.

    Yields:
        The URL of its database.
    """
    initdb, postgres = _program("initdb"), _program("postgres")
    user = _unprivileged_user()
    # Not below tmp_path: its parents are closed to other users, and too long for a socket's name.
    with tempfile.TemporaryDirectory(prefix="crma-pg-") as folder:
        if user:
            os.chown(folder, user["user"], user["group"])
        data = Path(folder) / "data"
        made = [initdb, "-D", data, "-U", "crma", "-A", "trust", "--no-sync", "-E", "UTF8"]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL, **user)
        options = ["-c", "listen_addresses=", "-c", f"unix_socket_directories={folder}"]
        quick = ["-c", "fsync=off"]  # the machine does not lose power during a test
        command = [postgres, "-D", data, *options, *quick]
        with subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, cwd=folder, **user
        ) as server:
            assert server.stderr is not None
            try:
                assert any("ready to accept connections" in line for line in server.stderr)
                yield f"postgresql://crma@/postgres?host={folder}"
            finally:
                server.send_signal(signal.SIGQUIT)  # nothing needs to be kept
                server.stderr.read()


def empty(url: str) -> None:
    """Remove everything that a test left in a database, and end its connections."""
    others = "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"{others} and datname = current_database()")
        connection.execute("drop schema public cascade")
        connection.execute("create schema public")


def _program(name: str) -> Path:
    found = shutil.which(name)
    if found is not None:
        return Path(found).resolve()
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # Debian: not in PATH
    if not installed:
        pytest.skip(f"PostgreSQL is not installed: there is no {name}")
    return installed[-1]


def _unprivileged_user() -> dict[str, Any]:
    """How subprocess starts a program that refuses to run as root."""
    if os.getuid() != 0:
        return {}
    user = pwd.getpwnam("nobody")
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
