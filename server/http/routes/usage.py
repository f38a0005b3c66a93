"""GET /usage: how many tokens keys have used."""

import json
from datetime import UTC, date, datetime, timedelta
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from crma.access.scope import Scope
from server.http.auth import TheCaller, require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.records_schemas import EACH, UsageQuery
from server.records.usage import Filter
from server.service.errors import InvalidField

router = APIRouter(dependencies=[require_key])

_BASE = "base"  # has no name in the records
_DAYS = timedelta(days=29)


@router.get("/usage", responses=documented(401, 403, 422, 503, example_of="/usage"))
async def usage(
    frontend: TheFrontend, caller: TheCaller, query: Annotated[UsageQuery, Query()]
) -> Response:
    """Sum up what this key has used, or for an admin what all have, on all servers of the database.

    Each prompt that ran is a request, also one that was cut short and each item of an ablation;
    refused ones are none. `cached_tokens` are a part of `prompt_tokens`. Each server writes every
    few seconds what it has counted.
    """
    first, last = _days(query)
    wanted = Filter(
        first_day=first.isoformat(),
        last_day=last.isoformat(),
        seen_by=None if Scope.ADMIN in caller.scopes else caller.name,
        key=query.key,
        task="" if query.task == _BASE else query.task,
    )
    sums = await frontend.usage.totals(wanted, [name for name in EACH if name in query.by])
    answer = {"from": wanted.first_day, "to": wanted.last_day, "usage": sums}
    content = await frontend.build(partial(_written, answer))
    return Response(content, media_type="application/json")


def _days(query: UsageQuery) -> tuple[date, date]:
    """The first and the last day. Raises InvalidField if there is none between them."""
    last = query.last_day or datetime.now(UTC).date()
    first = query.first_day or max(last, date.min + _DAYS) - _DAYS
    if first > last:
        message = "from: after the last day"
        allowed = f"<= {last}"
        raise InvalidField(message, field="from", value=str(first), allowed=allowed)
    return first, last


def _written(answer: dict[str, Any]) -> str:
    """The answer as JSON. The base model's usage has no task and no digest."""
    for row in answer["usage"]:
        for name in ("task", "task_digest"):
            if row.get(name) == "":
                row[name] = None
    return json.dumps(answer)
