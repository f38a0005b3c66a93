"""/ablation and /question_sets: the same questions under several variants, directly or as a job."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from crma.access.scope import Scope
from crma.evaluation.ablation import AblationSettings
from server.http.answer import STREAM_HEADERS, event, unless_gone
from server.http.audited import audited
from server.http.auth import TheCaller, counts, needs_ablate, needs_owner, require_ablate
from server.http.dependencies import TheAblations, TheFrontend
from server.http.error_handlers import answered, documented, error_body
from server.http.schemas import AblationRequest
from server.records.jobs import Job
from server.records.question_sets import EVERYONE
from server.service.ablation_spec import AblationSpec
from server.service.audit import Act
from server.service.caller import Caller
from server.service.errors import Draining

UPLOADS = "/question_sets/"

router = APIRouter(dependencies=[require_ablate])
owned = APIRouter()

_UPLOADING = audited("upload question set", needs_owner)


_STARTED: dict[int | str, dict[str, Any]] = {202: {"description": "Started in the background."}}
_ANSWERS = (
    documented(400, 401, 403, 404, 409, 413, 422, 429, 500, 503, 507, example_of="/ablation")
    | _STARTED
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
    is 202 with `id` and `status_url`: the job waits until there is room, and outlives a restart.
    """
    ready = await ablations.prepare(_spec(body, caller.name), caller)
    if not body.background:
        # If this ends early (the client disconnects, the server stops), it is cancelled, and the
        # engine aborts everything that it runs.
        return await unless_gone(request, ready.run())
    await ablations.start_job(ready)
    response.status_code = 202
    return {"id": ready.id, "status_url": f"/ablation/{ready.id}"}


def _spec(body: AblationRequest, owner: str) -> AblationSpec:
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
        question_set=body.question_set,
        questions=body.questions,
        tasks=body.tasks,
        temperature=body.temperature,
        timeout_s=body.timeout_s,
        background=body.background,
        provenance=body.provenance,
        as_sent=body.model_dump(mode="json", exclude_unset=True),
        owner=owner,
    )


def _choices(body: AblationRequest) -> tuple[str, ...] | Literal["own"]:
    return "own" if body.choices == "own" else tuple(body.choices or ())


@router.get("/ablation", responses=documented(401, 403, 503))
async def ablation_jobs(ablations: TheAblations, caller: TheCaller) -> list[dict[str, Any]]:
    """List the background jobs of this key, the newest first, without requests and results.

    `settings` has question_set, variants and scorer, as far as the request named them. For an
    admin, those of all keys.
    """
    listed = []
    for job in await ablations.jobs.newest(_seen_by(caller)):
        shown = _shown(job)
        del shown["request"]
        listed.append({**shown, "settings": job.settings})
    return listed


@router.get("/ablation/{id}", responses=documented(401, 403, 404, 503, example_of="/ablation/{id}"))
async def ablation_job(id: str, ablations: TheAblations, caller: TheCaller) -> Response:
    """Report on a background job: queued, running, done, failed, cancelled or interrupted.

    A job that was running when a server stopped is queued again and goes on after the items that
    are finished; only an older release left interrupted ones. `result` is the body of POST
    /ablation once the job is done. `request` can be sent again: the same adapters answer the same
    questions, or it is refused with 409.
    """
    job, result = await ablations.jobs.get_with_result(id, _seen_by(caller))
    # The result is kept as the JSON that is sent: a large one is not read and written again.
    start = json.dumps(_shown(job)).removesuffix("}")
    content = f'{start}, "result": {result or "null"}}}'
    return Response(content, media_type="application/json")


def _seen_by(caller: Caller) -> str | None:
    """The owner whose jobs exist for a caller; None: everyone's."""
    return None if Scope.ADMIN in caller.scopes else caller.name


def _shown(job: Job) -> dict[str, Any]:
    """A job as its owner sees it, without its result."""
    return {
        "id": job.id,
        "status": job.status,
        "created": job.created,
        "request": job.request,
        "progress": {"done": job.num_done, "total": job.num_items},
        "error": job.error,
    }


@router.get(
    "/ablation/{id}/events",
    responses=documented(401, 403, 404, 503),
    response_class=StreamingResponse,
)
async def ablation_events(
    id: str,
    request: Request,
    ablations: TheAblations,
    caller: TheCaller,
    frontend: TheFrontend,
) -> StreamingResponse:
    """Stream server-sent events: `progress` {done, total} at every change, then `done` {status}.

    `error` ends the stream in place of `done` if nothing more can be told. Its code is `draining`
    when the server stops: the job goes on elsewhere or later, and can be watched there.
    """
    jobs = ablations.jobs
    owner = _seen_by(caller)
    job = await jobs.get(id, owner)  # an unknown one is refused before the stream begins

    async def events() -> AsyncIterator[str]:
        nonlocal job
        try:
            async for job in jobs.watch(id, owner, lambda: frontend.draining):
                yield event({"done": job.num_done, "total": job.num_items}, "progress")
            if not job.has_ended:
                raise Draining("the server is stopping; the job goes on elsewhere or later")
            yield event({"status": job.status}, "done")
        except Exception as error:  # the status is sent already
            yield event(error_body(answered(request, error), request.scope["path"]), "error")

    return StreamingResponse(events(), media_type="text/event-stream", headers=STREAM_HEADERS)


@owned.delete("/ablation/{id}", responses=documented(401, 403, 404, 503, 507))
async def cancel_ablation(
    id: str,
    ablations: TheAblations,
    caller: TheCaller,
    act: Annotated[Act, audited("cancel ablation", needs_ablate)],
) -> dict[str, Any]:
    """Cancel a job unless it has ended; its record stays."""
    job = await ablations.jobs.cancel(id, _seen_by(caller))
    act.about["owner"] = job.owner
    return _shown(job)


@router.get("/question_sets", responses=documented(401, 403, 503, example_of="/question_sets"))
async def question_sets(ablations: TheAblations, caller: TheCaller) -> list[dict[str, Any]]:
    """List name, digest and number of items of the sets that this key may ask.

    `source` is store, shared (uploaded by an admin) or own. Of one name, an own set hides a shared
    one; sets of the store cannot be hidden.
    """
    return await ablations.question_sets.describe(caller.name)


_TEXT = {"schema": {"type": "string"}}
_QUESTIONS: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-ndjson": _TEXT}}}
_BATCH = 500  # questions that become text at once
_LINES = {
    "requestBody": {
        "content": {"application/x-ndjson": _TEXT, "text/plain": _TEXT},
        "required": True,
    }
}


@router.get(
    "/question_sets/{name}",
    responses=documented(401, 403, 404, 422, 503) | _QUESTIONS,
    response_class=StreamingResponse,
)
async def question_set(name: str, ablations: TheAblations, caller: TheCaller) -> StreamingResponse:
    """Return a question set as JSON Lines, as PUT takes it.

    Without the questions of tasks that the key may not use.
    """
    found = await ablations.question_sets.read(name, caller.name)
    questions = [each for each in found.questions if caller.may_use(each.task)]

    async def lines() -> AsyncIterator[str]:
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            yield "".join(f"{each.model_dump_json(exclude_defaults=True)}\n" for each in batch)
            await asyncio.sleep(0)  # others have their turn

    return StreamingResponse(lines(), media_type="application/x-ndjson")


@owned.put(
    "/question_sets/{name}",
    responses=documented(400, 401, 403, 409, 413, 422, 429, 503, 507),
    openapi_extra=_LINES,
    dependencies=[_UPLOADING, counts],  # in this order: what is refused costs nothing
)
async def upload_question_set(
    name: str,
    request: Request,
    ablations: TheAblations,
    frontend: TheFrontend,
    caller: TheCaller,
    act: Annotated[Act, _UPLOADING],
) -> dict[str, Any]:
    """Keep a question set, one question per line: id, task, question, answers, optional choices.

    The lines are checked and kept as they arrive, and the set appears once the last is there. An
    error names the line at fault. The set is for this key only, and hides a shared one of that
    name; a key for admin shares it with every key. It replaces an earlier one of the same name.
    """
    frontend.check_ready()
    sets = ablations.question_sets
    try:
        kept = await sets.upload(name, _owner_of_sets(caller), request.stream())
    except (UnicodeDecodeError, ClientDisconnect) as error:
        raise HTTPException(400) from error  # as for any other body: server/http/error_handlers.py
    act.about.update(digest=kept["digest"], source=kept["source"])
    return kept


@owned.delete(
    "/question_sets/{name}",
    responses=documented(401, 403, 404, 503, 507),
)
async def delete_question_set(
    name: str,
    ablations: TheAblations,
    caller: TheCaller,
    act: Annotated[Act, audited("delete question set", needs_owner)],
) -> dict[str, Any]:
    """Delete an uploaded question set of this key; a key for admin deletes shared ones."""
    owner = _owner_of_sets(caller)
    act.about["source"] = "shared" if owner == EVERYONE else "own"
    await ablations.question_sets.delete(name, owner)
    return {"name": name, "deleted": True}


def _owner_of_sets(caller: Caller) -> str:
    """Whose the sets are that a caller uploads and deletes."""
    return EVERYONE if Scope.ADMIN in caller.scopes else caller.name
