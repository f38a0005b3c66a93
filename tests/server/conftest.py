"""The same tests run on SQLite and on PostgreSQL."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from server.records.database import Database


@pytest.fixture
async def open_database(
    database_url: str | None, tmp_path: Path
) -> AsyncIterator[Callable[[], Database]]:
    """Opens the test's own database, as one more server would."""
    opened: list[Database] = []

    def open_once_more() -> Database:
        opened.append(Database(tmp_path / "kept", database_url))
        return opened[-1]

    yield open_once_more
    for database in opened:
        database.close()


@pytest.fixture
def database(open_database: Callable[[], Database]) -> Database:
    """The test's own database."""
    return open_database()
