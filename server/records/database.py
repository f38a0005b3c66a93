"""The database of the records: SQLite in a folder of this machine, or PostgreSQL by its URL.

It is opened, made and brought up to date when it is first needed, so that a server that keeps
nothing writes nothing. Each piece of work is one short transaction in a thread of this database's
own: the event loop never waits, and a database that hangs holds up nobody else.
"""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
)

from crma.core.errors import ConfigError
from crma.core.files import locked
from server.records.errors import RecordsNotWritable, RecordsUnavailable

P = ParamSpec("P")
T = TypeVar("T")
Work = Callable[Concatenate[Connection, P], T]
"""One transaction: it gets a connection, and must not keep it."""

FILE = "records.sqlite3"
_BUSY_S = 5.0  # how long SQLite waits for another process that writes
_NUM_THREADS = 4
_MIGRATION_LOCK = 0x43524D41  # of PostgreSQL's advisory locks: "CRMA"
_ROOM = "a disk with room that this server may write"
_POSTGRESQL = {  # a server that does not answer gives an error within these times
    "connect_timeout": 5,
    "tcp_user_timeout": 10_000,
    "options": "-c statement_timeout=60s -c idle_in_transaction_session_timeout=60s",
}
# Results of SQLite (sqlite.org/rescode.html) and states of PostgreSQL (its appendix A) for a disk
# that is full or fails, and for a database that may not be written.
_SQLITE_NOT_WRITABLE = {"SQLITE_FULL", "SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN"}
_POSTGRESQL_NOT_WRITABLE = {"53100", "25006", "42501"}


class Database:
    """The records of one server.

    Args:
        folder: where the SQLite file is; made when it is needed.
        url: `postgresql://…`; None: SQLite.

    Raises:
        ConfigError: the URL is none of PostgreSQL, or its driver is not installed.
    """

    def __init__(self, folder: Path, url: str | None = None) -> None:
        self._file = None if url else folder / FILE
        self._engine = _postgresql(url) if url else _sqlite(folder / FILE)
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "records")
        self._is_open = False
        self._opening = threading.Lock()

    async def run(self, work: Work[P, T], *arguments: P.args, **options: P.kwargs) -> T:
        """Run one transaction and return its result. If `work` raises, nothing has changed.

        Raises:
            RecordsNotWritable: the disk is full, or the database may not be written.
            RecordsUnavailable: the database does not answer, or is of a newer release.
        """
        loop = asyncio.get_running_loop()
        transaction = partial(self._transact, partial(work, **options), *arguments)
        return await loop.run_in_executor(self._threads, transaction)

    async def run_if_made(
        self, otherwise: T, work: Work[P, T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        """As `run`; but where nothing was ever recorded, write nothing and return `otherwise`."""
        if await asyncio.get_running_loop().run_in_executor(self._threads, self._is_made):
            return await self.run(work, *arguments, **options)
        return otherwise

    def close(self) -> None:
        """End the threads once their transactions have ended, and close the connections."""
        self._threads.shutdown()
        self._engine.dispose()

    def _is_made(self) -> bool:
        return self._is_open or self._file is None or self._file.exists()

    def _transact(self, work: Callable[..., T], *arguments: Any) -> T:
        with _translated("database_url" if self._file is None else "evaluations"):
            self._open()
            with self._engine.begin() as connection:
                return work(connection, *arguments)

    def _open(self) -> None:
        """Make the file and the tables, or bring them up to date, once."""
        with self._opening:
            if self._is_open:
                return
            if self._file is None:
                migrate(self._engine)
            else:
                self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with locked(self._file.parent):
                    # SQLite's further files get the mode of this one.
                    os.close(os.open(self._file, os.O_CREAT | os.O_CLOEXEC, 0o600))
                    migrate(self._engine)
            self._is_open = True


def migrate(engine: Engine) -> None:
    """Make the tables, or those of an older release into this one's, in one transaction.

    Raises:
        RecordsUnavailable: a newer release has been here.
    """
    # A server that keeps nothing need not wait for it.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # two servers may start at the same time
            connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            message = (
                "the database of the records is of a newer release of this server: "
                f"update the server, or give it another database ({error})"
            )
            raise RecordsUnavailable(message, field="database_url") from error


def _sqlite(file: Path) -> Engine:
    url = URL.create("sqlite", database=str(file))
    engine = create_engine(
        url, connect_args={"timeout": _BUSY_S}, json_serializer=_to_json, hide_parameters=True
    )
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, record: object) -> None:  # noqa: ARG001
    connection.isolation_level = None  # else the driver begins transactions of its own
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE waits for other writers now. A transaction that reads first and then writes could
    # not wait: SQLite fails it at once if another has written meanwhile.
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _postgresql(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise _wrong_url() from None  # the error would show the password
    if parsed.drivername not in ("postgresql", "postgres", "postgresql+psycopg"):
        raise _wrong_url()
    try:
        return create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            connect_args=_POSTGRESQL,
            pool_pre_ping=True,
            pool_size=_NUM_THREADS,
            json_serializer=_to_json,
            hide_parameters=True,
        )
    except ModuleNotFoundError as error:
        message = "PostgreSQL needs a driver: pip install 'crma-server[postgres]'"
        raise ConfigError(message, field="database_url") from error


def _wrong_url() -> ConfigError:
    message = "not the URL of a PostgreSQL database"
    allowed = "postgresql://user:password@host:port/database"
    return ConfigError(message, field="database_url", allowed=allowed)


_to_json = partial(json.dumps, allow_nan=False, separators=(",", ":"))


@contextmanager
def _translated(field: str) -> Iterator[None]:
    """Turn the errors of a database and of its folder into ours.

    Args:
        field: the setting that says where the database is.
    """
    try:
        yield
    except DBAPIError as error:
        reason = str(error.orig).strip()
        if _is_not_writable(error.orig):
            message = f"the records cannot be written: {reason}"
            raise RecordsNotWritable(message, field=field, allowed=_ROOM) from error
        if isinstance(error, IntegrityError | DataError | ProgrammingError):  # no fault of its own
            raise
        raise _unavailable(reason, field) from error
    except SQLAlchemyError as error:  # no connection became free
        raise _unavailable(str(error), field) from error
    except OSError as error:
        message = f"the records cannot be written: {error.strerror}: {error.filename}"
        raise RecordsNotWritable(message, field=field, allowed=_ROOM) from error


def _unavailable(reason: str, field: str) -> RecordsUnavailable:
    message = f"the database of the records does not answer: {reason}"
    return RecordsUnavailable(message, field=field, allowed="a database that answers")


def _is_not_writable(error: BaseException | None) -> bool:
    """Whether a driver's error says that the disk is full, or that nobody may write."""
    result = getattr(error, "sqlite_errorname", None) or ""
    is_sqlite = any(result.startswith(kind) for kind in _SQLITE_NOT_WRITABLE)
    return is_sqlite or getattr(error, "sqlstate", None) in _POSTGRESQL_NOT_WRITABLE
