"""Health, readiness, metrics and documentation. Open whatever keys are set: they say nothing of any request."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.frontend import TheFrontend
from server.schemas import Health

router = APIRouter()

DOCS = (Path(__file__).parent.parent / "docs.html").read_text("utf-8")


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """200 while the process lives."""
    return Health(status="alive")


@router.get(
    "/readyz", response_model=Health, responses={503: {"model": Health, "description": "Not ready; `reason` says why."}}
)
async def readyz(frontend: TheFrontend) -> Response:
    """200 once the store is verified and the engine has run a step; 503 before, and while draining."""
    reason = frontend.not_ready()
    health = Health(status="ready" if reason is None else "not_ready", reason=reason)
    return JSONResponse(health.model_dump(), status_code=200 if reason is None else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(frontend: TheFrontend) -> Response:
    """Prometheus text."""
    return Response(frontend.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
async def docs() -> HTMLResponse:
    """/openapi.json as a page that needs nothing from elsewhere."""
    return HTMLResponse(DOCS)
