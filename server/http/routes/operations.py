"""Health, readiness, version and metrics. Open whatever keys are set: they say nothing of any
request."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server import __version__
from server.http.dependencies import TheFrontend

router = APIRouter()

_EMPTY: dict[int | str, dict[str, Any]] = {
    200: {"description": "Ready.", "content": {}},
    503: {"description": "Not ready: /readyz says why."},
}


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process lives."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "Not ready; `reason` says why."}})
async def readyz(frontend: TheFrontend, response: Response) -> dict[str, Any]:
    """200 once the store is verified and the engine has run a step.

    503 before that, and while the server drains. `problems` names every task that cannot answer,
    with the reason. They do not make it 503: the other tasks and the base model answer. Neither
    does `store_problem`, why the store cannot be read now: what it held before goes on serving.
    """
    reason = frontend.not_ready()
    response.status_code = 503 if reason else 200
    status = "not_ready" if reason else "ready"
    registry = frontend.registry
    return {
        "status": status,
        "reason": reason,
        "problems": registry.problems,
        "store_problem": registry.store_problem,
    }


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


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(frontend: TheFrontend) -> Response:
    """Prometheus text."""
    # A plain function runs in a thread: the text of many series would hold up the event loop.
    return Response(generate_latest(frontend.metrics.registry), media_type=CONTENT_TYPE_LATEST)
