"""Health, readiness and metrics. Open whatever keys are set: they say nothing of any request."""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from server.http.dependencies import TheFrontend

router = APIRouter()


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process lives."""
    return {"status": "alive"}


@router.get("/readyz", responses={503: {"description": "Not ready; `reason` says why."}})
async def readyz(frontend: TheFrontend, response: Response) -> dict[str, Any]:
    """200 once the store is verified and the engine has run a step.

    503 before that, and while the server drains. `problems` names every task that cannot answer,
    with the reason. They do not make it 503: the other tasks and the base model answer.
    """
    reason = frontend.not_ready()
    response.status_code = 503 if reason else 200
    status = "not_ready" if reason else "ready"
    return {"status": status, "reason": reason, "problems": frontend.registry.problems}


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(frontend: TheFrontend) -> Response:
    """Prometheus text."""
    # A plain function runs in a thread: the text of many series would hold up the event loop.
    return Response(generate_latest(frontend.metrics.registry), media_type=CONTENT_TYPE_LATEST)
