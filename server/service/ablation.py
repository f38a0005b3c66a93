"""One ablation through the engine: what can be refused is refused before anything runs; then item
by item.
"""

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from crma.core.errors import DigestMismatch
from crma.core.selection import AdapterSelection, read_cell
from crma.evaluation.ablation import (
    AblationPlan,
    ItemResult,
    Job,
    check_settings,
    of_likelihoods,
    plan,
    report,
)
from crma.evaluation.question_set import Question, QuestionSet, inline_question_set
from crma.evaluation.scorers import Likelihood, continuations
from server.engine.errors import PromptTooLong, QueueFull
from server.engine.request import SamplingParams
from server.http.schemas import AblationRequest
from server.service.errors import AdapterUnloaded, DeadlineExceeded, GenerationFailed, InvalidField
from server.service.frontend import Frontend
from server.service.generation import Generation, all_of
from server.service.registry import Resolved


@dataclass(frozen=True)
class Ablation:
    """One that may run. `resolved`: by task, whose prompt format is its own."""

    body: AblationRequest
    frontend: Frontend
    questions: QuestionSet
    plan: AblationPlan
    resolved: Mapping[tuple[str, AdapterSelection], Resolved]
    provenance: dict[str, Any]
    id: str = field(default_factory=lambda: f"abl-{uuid.uuid4().hex}")

    def request(self) -> dict[str, Any]:
        """What was asked, with what answers: sent again, it is answered by the same or refused."""
        return self.body.model_dump(mode="json", exclude_unset=True) | {
            "provenance": self.provenance
        }

    async def run(self, count: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The body of the answer; `count` is called after each job.

        Cancelled, it aborts what is in the engine.
        """
        started, jobs = time.monotonic(), self.plan.jobs
        outcomes: list[ItemResult] = [ItemResult("failed")] * len(jobs)
        left = iter(enumerate(jobs))

        async def work() -> None:
            for at, job in left:  # the variants of an item are neighbours, and so share batches
                async with self.frontend.ablation_slots:  # of all ablations, which take turns
                    outcomes[at] = await self._outcome(job)
                count()

        await all_of(work() for _ in range(self.frontend.settings.max_ablation_inflight))
        settings = {**_settings(self.body), "seed": self.body.seed}
        rows = self.plan.by_variant(outcomes)
        result = await asyncio.to_thread(report, self.questions.questions, rows, **settings)
        self.frontend.metrics.set_ablation(
            {name: each.get("accuracy") for name, each in result["variants"].items()}
        )
        return {
            "id": self.id,
            "question_set": self.questions.describe(),
            "scorer": self.body.scorer,
            **result,
            "provenance": self.provenance,
            "wall_s": round(time.monotonic() - started, 4),
        }

    async def _outcome(self, job: Job) -> ItemResult:
        """One answer, or the likelihoods of given ones; its own failure is its outcome."""
        question, body = self.questions.questions[job.question], self.body
        resolved = self.resolved[question.task, job.selection]
        deadline = time.monotonic() + (body.timeout_s or self.frontend.settings.request_timeout_s)
        texts = continuations(body.scorer, question.answers, question.choices)
        try:
            if not texts:
                own_seed = hashlib.sha256(f"{body.seed} {job.nth} {question.id}".encode()).digest()[
                    :6
                ]
                sampling = SamplingParams(
                    body.max_tokens, body.temperature, seed=int.from_bytes(own_seed)
                )
                generation = await self._finished(question, resolved, deadline, sampling, None)
                return ItemResult("scored", text=generation.sequences[0].text)
            found = []  # one after the other: all but the first find the question in the prefix cache
            for text in texts:
                generation = await self._finished(
                    question, resolved, deadline, SamplingParams(1), text
                )
                logprobs = [each.logprob for each in generation.prompt_logprobs]
                found.append(Likelihood(sum(logprobs), len(logprobs)))
            return of_likelihoods(body.scorer, texts, found)
        except DeadlineExceeded as error:
            return ItemResult("timed_out", error=error.message)
        except (AdapterUnloaded, GenerationFailed, PromptTooLong) as error:
            return ItemResult("failed", error=str(error))

    async def _finished(
        self,
        question: Question,
        resolved: Resolved,
        deadline: float,
        sampling: SamplingParams,
        answer: str | None,
    ) -> Generation:
        """One generation. A full queue is waited out until the deadline."""
        options: dict[str, Any] = {"prefix": "abl", "interactive": False, "answer": answer}
        while (left := deadline - time.monotonic()) > 0:
            try:
                made = self.frontend.generation(
                    question.question, resolved, sampling, timeout_s=left, **options
                )
                generation = await made
                await generation.finished()
                return generation
            except QueueFull as error:
                await asyncio.sleep(min(left, error.retry_after))
        raise DeadlineExceeded("the queue was full until the deadline", field="timeout_s")


async def prepare(body: AblationRequest, frontend: Frontend) -> Ablation:
    """Resolves and checks everything. Raises what a route answers with."""
    questions = await asyncio.to_thread(_question_set, body, frontend)
    await asyncio.to_thread(check_settings, questions.questions, **_settings(body))
    resolved: dict[tuple[str, AdapterSelection], Resolved] = {}
    used: dict[str, Any] = {"tasks": {}}

    def select(variant: str, task: str) -> AdapterSelection:
        cell = read_cell(variant)
        name = f"{task}@{cell.task_version}" if cell.task_version else task
        found = frontend.resolve(name if cell.task else None, cell.crma, cell.crma_version)
        frontend.check(found, SamplingParams(), body.timeout_s, needs_format=True)
        resolved[task, found.selection] = found
        if cell.task:
            used["tasks"][name] = found.selection.task_digest
        if cell.crma:
            used[f"crma@{cell.crma_version}" if cell.crma_version else "crma"] = (
                found.selection.crma_digest
            )
        return found.selection

    work = plan(questions.questions, body.variants, select, repeat=body.repeat)
    num_item_variants = len(questions.questions) * len(
        body.variants
    )  # whether or not their answers are shared
    limit = frontend.settings.max_ablation_direct
    if num_item_variants > limit and not body.background:
        message, allowed = (
            f'over {limit} item-variants need "background": true',
            f"<= {limit} item-variants",
        )
        raise InvalidField(message, field="questions", value=num_item_variants, allowed=allowed)
    provenance = frontend.provenance(
        body.seed, used.pop("crma", None), question_set=questions.digest, **used
    )
    if body.provenance is not None:
        both = {**provenance, **body.provenance}
        if differ := [name for name in both if provenance.get(name) != body.provenance.get(name)]:
            message = f"{', '.join(differ)}: not what answered then; name the versions in variants, or leave provenance out"
            raise DigestMismatch(
                message,
                field="provenance",
                value=differ,
                allowed=[provenance.get(n) for n in differ],
            )
    return Ablation(body, frontend, questions, work, resolved, provenance)


def _settings(body: AblationRequest) -> dict[str, Any]:
    return body.model_dump(include={"scorer", "margin", "tolerance", "relative_tolerance"})


def _question_set(body: AblationRequest, frontend: Frontend) -> QuestionSet:
    """The inline questions or those of a name, filtered."""
    if body.questions is not None:
        questions = inline_question_set(body.questions)
    else:
        questions = frontend.question_sets.read(body.question_set or "")
    return questions.for_tasks(body.tasks) if body.tasks else questions
