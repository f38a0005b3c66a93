"""GET /runs: what training measured, task by task and stage by stage."""

from typing import Any

from fastapi import APIRouter

from server.http.auth import TheCaller, require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.service.run_records import OF_THE_RELEASE, RunRecords

router = APIRouter(dependencies=[require_key])


# Plain functions run in a thread: they read files.
@router.get("/runs", responses=documented(401, 403))
def runs(frontend: TheFrontend, caller: TheCaller) -> list[dict[str, Any]]:
    """List the training runs whose records this server has: arm, seed, tasks and measures.

    Those that trained on a task that the key may not use are left out.
    """
    return _records(frontend).summaries(caller)


@router.get("/runs/{id:path}", responses=documented(401, 403, 404))
def run(id: str, frontend: TheFrontend, caller: TheCaller) -> dict[str, Any]:
    """Return the record of a run, as `crma train` wrote it.

    `loss` and `accuracy` have a row for the base model and one after each stage, and a column for
    each task of `order`.
    """
    return _records(frontend).read(id, caller)


def _records(frontend: TheFrontend) -> RunRecords:
    return RunRecords(frontend.settings.runs or OF_THE_RELEASE)
