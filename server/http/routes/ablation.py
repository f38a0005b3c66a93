"""/ablation and /question_sets: the same questions under several variants, directly or as a job."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from crma.evaluation.ablation import AblationSettings
from server.http.answer import STREAM_HEADERS, event, unless_gone
from server.http.audited import audited
from server.http.auth import TheCaller, counts, require_ablate, require_admin
from server.http.dependencies import TheAblations, TheFrontend
from server.http.error_handlers import documented
from server.http.schemas import AblationRequest
from server.service.ablation import AblationSpec
from server.service.audit import Act
from server.service.caller import Caller
from server.service.jobs import Job

router = APIRouter(dependencies=[require_ablate])
admin = APIRouter(dependencies=[require_admin])


_STARTED: dict[int | str, dict[str, Any]] = {202: {"description": "Started in the background."}}
_ANSWERS = (
    documented(400, 401, 403, 404, 409, 413, 422, 429, 500, 503, example_of="/ablation") | _STARTED
)


@router.post("/ablation", responses=_ANSWERS, dependencies=[counts])
async def ablation(
    body: AblationRequest,
    request: Request,
    response: Response,
    ablations: TheAblations,
    caller: TheCaller,
) -> dict[str, Any]:
    """Ask every question under every variant, and compare the variants item by item.

    Accuracies are over scored items. Failed and timed-out items are counted separately and never as
    wrong; worst_case and best_case say how much they could change. `question_set` has the number of
    items after any filter. Interactive requests run before the items. With `background`, the answer
    is 202 with `id` and `status_url`.
    """
    ready = await ablations.prepare(_spec(body, caller))
    if not body.background:
        # If this ends early (the client disconnects, the server stops), it is cancelled, and the
        # engine aborts everything that it runs.
        return await unless_gone(request, ready.run())
    await ablations.start(ready)
    response.status_code = 202
    return {"id": ready.id, "status_url": f"/ablation/{ready.id}"}


def _spec(body: AblationRequest, caller: Caller) -> AblationSpec:
    """Turn the body of a request into the service's own type."""
    settings = AblationSettings(
        variants=tuple(body.variants),
        scorer=body.scorer,
        tolerance=body.tolerance,
        relative_tolerance=body.relative_tolerance,
        margin=body.margin,
        seed=body.seed,
        max_tokens=body.max_tokens,
        repeat=body.repeat,
        raw=body.raw,
        choices=_choices(body),
    )
    return AblationSpec(
        settings=settings,
        caller=caller,
        question_set=body.question_set,
        questions=body.questions,
        tasks=body.tasks,
        temperature=body.temperature,
        timeout_s=body.timeout_s,
        background=body.background,
        provenance=body.provenance,
        as_sent=body.model_dump(mode="json", exclude_unset=True),
    )


def _choices(body: AblationRequest) -> tuple[str, ...] | Literal["own"]:
    return "own" if body.choices == "own" else tuple(body.choices or ())


@router.get("/ablation/{id}", responses=documented(401, 403, 404, example_of="/ablation/{id}"))
async def ablation_job(id: str, ablations: TheAblations, caller: TheCaller) -> dict[str, Any]:
    """Report on a background job: running, done, failed, cancelled or interrupted.

    An interrupted job was running when the server stopped. `result` is the body of POST /ablation
    once the job is done. `request` can be sent again: the same adapters answer the same questions,
    or it is refused with 409.
    """
    job = ablations.job(id, caller)
    result = await asyncio.to_thread(ablations.jobs.result, job)
    return {**_shown(job), "result": result}


@router.get(
    "/ablation/{id}/events", responses=documented(401, 403, 404), response_class=StreamingResponse
)
async def ablation_events(
    id: str, ablations: TheAblations, frontend: TheFrontend, caller: TheCaller
) -> StreamingResponse:
    """Stream server-sent events: `progress` {done, total} at every change, then `done` {status}."""
    job = ablations.job(id, caller)

    async def events() -> AsyncIterator[str]:
        async for each in ablations.jobs.watch(job):
            if frontend.draining:
                return
            yield event(dict(each.progress), "progress")
        yield event({"status": job.status}, "done")

    return StreamingResponse(events(), media_type="text/event-stream", headers=STREAM_HEADERS)


@router.delete("/ablation/{id}", responses=documented(401, 403, 404))
async def cancel_ablation(id: str, ablations: TheAblations, caller: TheCaller) -> dict[str, Any]:
    """Cancel a job if it is still running; its record stays."""
    job = ablations.job(id, caller)
    await ablations.jobs.cancel(job)
    return _shown(job)


def _shown(job: Job) -> dict[str, Any]:
    """A job as its owner sees it."""
    return {name: value for name, value in asdict(job).items() if name != "owner"}


@router.get("/question_sets", responses=documented(401, 403, example_of="/question_sets"))
async def question_sets(ablations: TheAblations) -> list[dict[str, Any]]:
    """List name, digest and number of items of the store's sets and of the uploaded ones."""
    return await asyncio.to_thread(ablations.question_sets.describe)


_TEXT = {"schema": {"type": "string"}}
_LINES = {
    "requestBody": {
        "content": {"application/x-ndjson": _TEXT, "text/plain": _TEXT},
        "required": True,
    }
}


@admin.put(
    "/question_sets/{name}",
    responses=documented(400, 401, 403, 413, 422),
    openapi_extra=_LINES,
)
async def upload_question_set(
    name: str,
    request: Request,
    ablations: TheAblations,
    act: Annotated[Act, audited("upload question set")],
) -> dict[str, Any]:
    """Keep a question set, one question per line: id, task, question, answers, optional choices.

    An error names the line at fault.
    """
    try:
        lines = await request.body()
    except (UnicodeDecodeError, ClientDisconnect) as error:
        raise HTTPException(400) from error  # as for any other body: server/http/error_handlers.py
    question_set = await asyncio.to_thread(ablations.question_sets.write, name, lines)
    act.about["digest"] = question_set.digest
    return question_set.describe()
