"""POST /ablation: the same questions under several variants, with intervals and tests on the
difference; its jobs.
"""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from server.http.answer import STREAM_HEADERS, event, unless_gone
from server.http.auth import require_admin, require_key
from server.http.dependencies import TheFrontend
from server.http.error_handlers import documented
from server.http.schemas import AblationRequest
from server.service.ablation import prepare
from server.service.jobs import Job

router = APIRouter(dependencies=[Depends(require_key)])


_STARTED: dict[int | str, dict[str, Any]] = {202: {"description": "Started in the background."}}
_ANSWERS = (
    documented(400, 401, 404, 409, 413, 422, 429, 500, 503, example_of="/ablation") | _STARTED
)


@router.post("/ablation", responses=_ANSWERS)
async def ablation(
    body: AblationRequest, request: Request, response: Response, frontend: TheFrontend
) -> dict[str, Any]:
    """Ask every question under every variant and compare, item by item; a failed item is no wrong
    answer.

    Accuracies are over scored items; failed and timed-out items are counted apart, never as wrong;
    worst_case and best_case say what they could change. `question_set` has the number of items
    after any filter. Items give way to interactive requests. In the background: 202 with `id` and
    `status_url`.
    """
    ready = await prepare(body, frontend)
    if not body.background:
        # Whatever ends this early (the client goes away, the server stops) cancels and so aborts
        # all that are running.
        return await unless_gone(request, ready.run())
    await frontend.ablation_jobs.start(ready.id, ready.request(), len(ready.plan.jobs), ready.run)
    response.status_code = 202
    return {"id": ready.id, "status_url": f"/ablation/{ready.id}"}


@router.get("/ablation/{id}", responses=documented(401, 404, example_of="/ablation/{id}"))
async def ablation_job(id: str, frontend: TheFrontend) -> dict[str, Any]:
    """A job in the background: running, done, failed, cancelled, or interrupted by the end of the
    server.

    `result` is the body of POST /ablation once it is done. `request`, sent again, is answered by
    the same adapters and questions, or refused with 409.
    """
    job = frontend.ablation_jobs.get(id)
    return {**asdict(job), "result": await asyncio.to_thread(frontend.ablation_jobs.result, job)}


@router.get(
    "/ablation/{id}/events", responses=documented(401, 404), response_class=StreamingResponse
)
async def ablation_events(id: str, frontend: TheFrontend) -> StreamingResponse:
    """Server-sent events: `progress` {done, total} whenever it has moved, then `done` {status}."""
    job = frontend.ablation_jobs.get(id)

    async def events() -> AsyncIterator[str]:
        async for each in frontend.ablation_jobs.changes(job):
            if frontend.draining:
                return
            yield event(dict(each.progress), "progress")
        yield event({"status": job.status}, "done")

    return StreamingResponse(events(), media_type="text/event-stream", headers=STREAM_HEADERS)


@router.delete("/ablation/{id}", responses=documented(401, 404))
async def cancel_ablation(id: str, frontend: TheFrontend) -> Job:
    """Cancels it where it runs still; its record stays."""
    job = frontend.ablation_jobs.get(id)
    await frontend.ablation_jobs.cancel(job)
    return job


@router.get("/question_sets", responses=documented(401, example_of="/question_sets"))
async def question_sets(frontend: TheFrontend) -> list[dict[str, Any]]:
    """Name, digest and number of items of the store's sets and of those that were uploaded."""
    return await asyncio.to_thread(frontend.question_sets.describe)


_TEXT = {"schema": {"type": "string"}}
_LINES = {
    "requestBody": {
        "content": {"application/x-ndjson": _TEXT, "text/plain": _TEXT},
        "required": True,
    }
}


@router.put(
    "/question_sets/{name}",
    responses=documented(400, 401, 403, 413, 422),
    dependencies=[Depends(require_admin)],
    openapi_extra=_LINES,
)
async def upload_question_set(name: str, request: Request, frontend: TheFrontend) -> dict[str, Any]:
    """Keeps a set, one question a line: id, task, question, answers, and perhaps choices.

    An error names its line.
    """
    try:
        lines = await request.body()
    except (UnicodeDecodeError, ClientDisconnect) as error:
        raise HTTPException(400) from error  # as of any other body: server/errors.py
    return (await asyncio.to_thread(frontend.question_sets.write, name, lines)).describe()
