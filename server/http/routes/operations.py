"""Health, readiness, version and metrics. Most are open whatever keys are set: they say nothing of
any request."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server import __version__
from server.http.auth import TheCaller, require_metrics, require_nothing
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.service.caller import Caller
from server.service.frontend import Frontend

router = APIRouter(dependencies=[require_nothing])
metrics_router = APIRouter(dependencies=[require_metrics])

_EMPTY: dict[int | str, dict[str, Any]] = {
    200: {"description": "Ready.", "content": {}},
    503: {"description": "Not ready: /readyz says why."},
}
_METRICS = documented(401, 403) | {200: {"content": {"text/plain": {}}}}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process lives."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "Not ready; `reason` says why."}})
async def readyz(frontend: TheFrontend, caller: TheCaller, response: Response) -> dict[str, Any]:
    """200 once the store is verified and the engine has passed its first steps.

    503 before that, and while the server drains. `problems` names every task that cannot answer,
    with the reason. They do not make it 503: the other tasks and the base model answer. Neither
    does `store_problem`, why the store cannot be read now: what it held before goes on serving.
    Once some tasks do not exist for some key, both are shown to whom these tasks exist.
    """
    reason = frontend.not_ready()
    response.status_code = 503 if reason else 200
    status = "not_ready" if reason else "ready"
    return {
        "status": status,
        "reason": reason,
        "problems": _problems(frontend, caller),
        "store_problem": _store_problem(frontend, caller),
    }


def _problems(frontend: Frontend, caller: Caller) -> dict[str, str]:
    """The tasks that cannot answer, of those whose names a caller may see."""
    if frontend.keys.is_restricted and not caller.name:
        return {}
    found = frontend.registry.problems.items()
    return {name: why for name, why in found if caller.may_use(name)}


def _store_problem(frontend: Frontend, caller: Caller) -> str | None:
    """Why the store cannot be read, if a caller may see the names that may be in it."""
    if frontend.keys.is_restricted and (not caller.name or caller.tasks is not None):
        return None
    return frontend.registry.store_problem


@router.get("/health", response_class=Response, responses=_EMPTY)
async def health(frontend: TheFrontend) -> Response:
    """As /readyz, for vLLM's clients and routers: the answer is empty.

    A vLLM server listens only once it can answer, so its /health is about readiness too.
    """
    return Response(status_code=503 if frontend.not_ready() else 200)


@router.get("/ping", response_class=Response, responses=_EMPTY)
async def ping(frontend: TheFrontend) -> Response:
    """As /health, for Amazon SageMaker, which sends requests once this is 200."""
    return await health(frontend)


@router.post("/ping", response_class=Response, responses=_EMPTY)
async def post_ping(frontend: TheFrontend) -> Response:
    """As GET /ping."""
    return await health(frontend)


@router.get("/version")
async def version() -> dict[str, str]:
    """The version of CRMA Server."""
    return {"version": __version__}


@metrics_router.get("/metrics", response_class=Response, responses=_METRICS)
def metrics(frontend: TheFrontend) -> Response:
    """Prometheus text.

    It needs a key for metrics, or for admin, once some tasks do not exist for some key.
    """
    # A plain function runs in a thread: the text of many series would hold up the event loop.
    return Response(generate_latest(frontend.metrics.registry), media_type=CONTENT_TYPE_LATEST)


_ROUTES = [*router.routes, *metrics_router.routes]
PATHS = frozenset(route.path for route in _ROUTES if isinstance(route, APIRoute))
"""What a port for health alone answers."""
