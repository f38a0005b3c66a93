"""POST /ablation: the same questions under several variants, with intervals and tests on the difference."""

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, Depends, Request

from crma.ablation import ItemResult, Job, check_settings, plan, report
from crma.errors import NotFound
from crma.question_set import Question, QuestionSet, inline_question_set, read_question_set
from crma.selection import AdapterSelection
from server.auth import require_key
from server.engine.errors import PromptTooLong, QueueFull
from server.engine.request import SamplingParams
from server.errors import AdapterUnloaded, DeadlineExceeded, GenerationFailed, InvalidField, documented
from server.frontend import Frontend, Generation, TheFrontend, all_of, unless_gone
from server.registry import Resolved
from server.schemas import AblationRequest

router = APIRouter(dependencies=[Depends(require_key)])


@router.post("/ablation", responses=documented(400, 401, 404, 409, 413, 422, 500, 503, of="/ablation"))
async def ablation(body: AblationRequest, request: Request, frontend: TheFrontend) -> dict[str, Any]:
    """Ask every question under every variant and compare, item by item. Greedy; a failed item is no wrong answer.

    Accuracies are over scored items; failed and timed-out items are counted apart, never as wrong. `question_set` has
    the number of items after any filter.
    """
    started = time.monotonic()
    asked = await asyncio.to_thread(_question_set, body, frontend)
    check_settings(asked.questions, scorer=body.scorer, margin=body.margin)
    selected: dict[tuple[str, AdapterSelection], Resolved] = {}  # by task, whose prompt format is its own

    def select(variant: str, task: str) -> AdapterSelection:
        resolved = frontend.resolve(task if "task" in variant else None, "crma" in variant)
        selected[task, resolved.selection] = resolved
        return resolved.selection

    work = plan(asked.questions, body.variants, select, repeat=body.repeat)
    num_item_variants = len(asked.questions) * len(body.variants)  # whether or not their answers are shared
    if num_item_variants > (limit := frontend.settings.max_ablation_direct):
        message = f'over {limit} item-variants need "background": true, which is not honoured yet; ask fewer at a time'
        allowed = f"<= {limit} item-variants"
        raise InvalidField(message, field="questions", value=num_item_variants, allowed=allowed)

    async def outcome(job: Job) -> ItemResult:
        question = asked.questions[job.question]
        async with frontend.ablation_slots:  # few are in the engine at once, so that others' requests are not starved
            return await _answer(question, selected[question.task, job.selection], body, frontend)

    # Whatever ends this early (the client goes away, the server stops) cancels and so aborts all that are running.
    outcomes = await unless_gone(request, all_of(outcome(job) for job in work.jobs))
    settings: dict[str, Any] = {"scorer": body.scorer, "margin": body.margin, "seed": body.seed}
    result = await asyncio.to_thread(report, asked.questions, work.by_variant(outcomes), **settings)
    frontend.metrics.set_ablation({name: each["accuracy"] for name, each in result["variants"].items()})
    tasks = {task: selection.task_digest for task, selection in selected if selection.task_digest is not None}
    crma = next((selection.crma_digest for _, selection in selected if selection.crma_digest is not None), None)
    return {
        "id": f"abl-{uuid.uuid4().hex}",
        "question_set": asked.describe(),
        "scorer": body.scorer,
        **result,
        "provenance": frontend.provenance(body.seed, crma, tasks=tasks),
        "wall_s": round(time.monotonic() - started, 4),
    }


def _question_set(body: AblationRequest, frontend: Frontend) -> QuestionSet:
    """The inline questions or the named set of the store, filtered. A name is looked up in a list, never in a path."""
    if body.questions is not None:
        questions = inline_question_set(body.questions)
    else:
        there = {path.stem: path for path in sorted((frontend.settings.store / "question_sets").glob("*.jsonl"))}
        name = body.question_set or ""
        if name not in there:
            raise NotFound(f"no question set {name!r}", field="question_set", value=name, allowed=list(there))
        questions = read_question_set(there[name])
    return questions.for_tasks(body.tasks) if body.tasks else questions


async def _answer(question: Question, resolved: Resolved, body: AblationRequest, frontend: Frontend) -> ItemResult:
    """One generation; its own failure is its outcome. A full queue is waited out within the item's deadline."""
    sampling = SamplingParams(max_tokens=body.max_tokens, seed=body.seed)
    deadline = time.monotonic() + (body.timeout_s or frontend.settings.request_timeout_s)
    generation: Generation | None = None
    try:
        while True:
            try:
                generation = generation or await frontend.generation(
                    question.question, resolved, sampling, timeout_s=body.timeout_s, prefix="abl"
                )
                await generation.finished()
                return ItemResult("scored", text=generation.sequences[0].text)
            except QueueFull as error:
                if (left := deadline - time.monotonic()) <= 0:
                    return ItemResult("timed_out", error="the queue was full until the deadline")
                await asyncio.sleep(min(left, error.retry_after))
    except DeadlineExceeded as error:
        return ItemResult("timed_out", error=error.message)
    except (AdapterUnloaded, GenerationFailed, PromptTooLong) as error:
        return ItemResult("failed", error=str(error))
