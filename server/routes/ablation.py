"""POST /ablation: the same questions under several variants, with intervals and tests on the difference."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, Depends, Request

from crma.ablation import AblationPlan, ItemResult, Job, check_settings, plan, report
from crma.errors import NotFound
from crma.question_set import Question, QuestionSet, inline_question_set, read_question_set
from crma.selection import AdapterSelection, Variant
from server import __version__
from server.auth import require_key
from server.engine.request import PromptTooLong, QueueFull, SamplingParams
from server.errors import DeadlineExceeded, GenerationFailed, InvalidField
from server.frontend import Frontend, TheFrontend, unless_gone
from server.registry import Resolved
from server.routes.responses import errors
from server.schemas import AblationProvenance, AblationRequest, AblationResponse, QuestionSetInfo

router = APIRouter(dependencies=[Depends(require_key)])

Selected = dict[tuple[str, AdapterSelection], Resolved]


@router.post("/ablation", response_model=AblationResponse, responses=errors(400, 401, 404, 409, 413, 422, 500, 503))
async def ablation(body: AblationRequest, request: Request, frontend: TheFrontend) -> AblationResponse:
    """Ask every question under every variant and compare, item by item. Greedy; a failed item is no wrong answer."""
    started = time.monotonic()
    check_settings(scorer=body.scorer, margin=body.margin)
    questions = await asyncio.to_thread(_question_set, body, frontend)
    selected: Selected = {}
    work = plan(questions.questions, body.variants, _selector(frontend, selected), repeat=body.repeat)
    _check_size(work, frontend.settings.max_ablation_direct)
    outcomes = await unless_gone(request, _run(work, questions, selected, body, frontend))
    result = await asyncio.to_thread(
        report, questions.questions, work.by_variant(outcomes), scorer=body.scorer, margin=body.margin, seed=body.seed
    )
    frontend.metrics.set_ablation({name: each["accuracy"] for name, each in result["variants"].items()})
    return AblationResponse(
        id=f"abl-{uuid.uuid4().hex}",
        question_set=QuestionSetInfo(**questions.describe()),
        scorer=body.scorer,
        **result,
        provenance=_provenance(selected, body.seed, frontend),
        wall_s=round(time.monotonic() - started, 4),
    )


def _question_set(body: AblationRequest, frontend: Frontend) -> QuestionSet:
    """The inline questions or the named set of the store, filtered. A name is looked up in a list, never in a path."""
    if body.questions is not None:
        questions = inline_question_set([question.model_dump() for question in body.questions])
    else:
        folder = frontend.settings.store / "question_sets"
        there = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
        if body.question_set not in there:
            name = body.question_set
            raise NotFound(f"no question set {name!r}", field="question_set", value=name, allowed=list(there))
        questions = read_question_set(there[body.question_set])
    return questions.for_tasks(body.tasks) if body.tasks else questions


def _selector(frontend: Frontend, selected: Selected) -> Any:
    """(variant, task) -> selection, remembering what it resolved to."""

    def select(variant: Variant, task: str) -> AdapterSelection:
        resolved = frontend.resolve(task if "task" in variant else None, "crma" in variant)
        selected[task, resolved.selection] = resolved
        return resolved.selection

    return select


def _check_size(work: AblationPlan, limit: int) -> None:
    if work.num_item_variants > limit:
        raise InvalidField(
            f'over {limit} item-variants an ablation would need "background": true, which is not honoured in this '
            "version; ask fewer questions or variants at a time",
            field="questions",
            value=work.num_item_variants,
            allowed=f"<= {limit} item-variants",
            code="too_many_items",
        )


async def _run(
    work: AblationPlan, questions: QuestionSet, selected: Selected, body: AblationRequest, frontend: Frontend
) -> list[ItemResult]:
    """Outcomes in the order of the jobs. Few are in the engine at once, so that others' requests are not starved.

    Whatever ends this early (the client goes away, the server stops) cancels and so aborts all that are running.
    """

    async def one(job: Job) -> ItemResult:
        question = questions.questions[job.question]
        async with frontend.ablation_slots:
            return await _answer(question, selected[question.task, job.selection], body, frontend)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(job)) for job in work.jobs]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


async def _answer(question: Question, resolved: Resolved, body: AblationRequest, frontend: Frontend) -> ItemResult:
    """One generation; its own failure is its outcome. A full queue is waited out within the item's deadline."""
    sampling = SamplingParams(max_tokens=body.max_tokens, seed=body.seed)
    arrival = time.monotonic()
    prompt = await frontend.encode(question.question, resolved)
    while True:
        generation = frontend.generation(
            prompt, resolved, sampling, timeout_s=body.timeout_s, arrival=arrival, prefix="abl"
        )
        try:
            await generation.finished()
            return ItemResult("scored", text=generation.sequences[0].text)
        except QueueFull as error:
            left = (generation.request.deadline or arrival) - time.monotonic()
            if left <= 0:
                return ItemResult("timed_out", error="the queue was full until the deadline")
            await asyncio.sleep(min(left, error.retry_after))
        except DeadlineExceeded as error:
            return ItemResult("timed_out", error=error.message)
        except (GenerationFailed, PromptTooLong) as error:
            return ItemResult("failed", error=str(error))
        finally:
            generation.close()


def _provenance(selected: Selected, seed: int, frontend: Frontend) -> AblationProvenance:
    tasks = {task: selection.task_digest for task, selection in selected if selection.task_digest is not None}
    crma = {selection.crma_digest for _, selection in selected} - {None}
    return AblationProvenance(
        base=frontend.model.digest,
        tasks=tasks,
        crma=next(iter(crma), None),
        engine=__version__,
        dtype=frontend.model.dtype,
        seed=seed,
    )
