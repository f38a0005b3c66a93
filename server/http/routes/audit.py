"""GET /audit: what administrators did."""

import json
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Response

from server.http.auth import require_admin
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.records_schemas import AuditQuery
from server.records.audit import Filter

admin = APIRouter(dependencies=[require_admin])


@admin.get("/audit", responses=documented(401, 403, 422, 503, example_of="/audit"))
async def audit(frontend: TheFrontend, query: Annotated[AuditQuery, Query()]) -> Response:
    """List the acts of administrators on all servers of the database, done or refused, the newest
    first.

    `result` is done, aborted (the server stopped meanwhile), or the code of the error whose words
    `reason` has. The `id` of the last act, sent as `before`, gives those before it.
    """
    wanted = Filter(query.before, query.who, query.what)
    acts = await frontend.audit.newest(wanted, query.limit)
    content = await frontend.build(partial(json.dumps, acts))
    return Response(content, media_type="application/json")
