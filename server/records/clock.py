"""The database's clock, so that servers whose own clocks differ agree on when a lease ends."""

from typing import Any

from sqlalchemy import Double
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement


class now_s(FunctionElement[float]):  # noqa: N801 (it is used as a function)
    """Seconds since 1970, of the machine on which the database runs."""

    type = Double()
    inherit_cache = True


@compiles(now_s, "sqlite")
def _sqlite(element: now_s, compiler: Any, **options: Any) -> str:  # noqa: ARG001
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now_s, "postgresql")
def _postgresql(element: now_s, compiler: Any, **options: Any) -> str:  # noqa: ARG001
    return "(extract(epoch from clock_timestamp())::float8)"
