"""Ablations through the engine: everything is checked before anything runs, then item by item."""

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from crma.core.errors import DigestMismatch, StoreError
from crma.core.selection import AdapterSelection, read_cell
from crma.evaluation.ablation import (
    AblationPlan,
    AblationSettings,
    ItemResult,
    Job,
    of_likelihoods,
    plan,
)
from crma.evaluation.question_set import Question, QuestionSet, inline_question_set
from crma.evaluation.report import body
from crma.evaluation.scorers import Likelihood, continuations
from crma.models.prompts import Format
from server.engine.errors import PromptTooLong, QueueFull
from server.engine.request import Constraint, ConstraintKind, SamplingParams
from server.service import jobs
from server.service.caller import Caller
from server.service.errors import AdapterUnloaded, DeadlineExceeded, GenerationFailed, InvalidField
from server.service.frontend import Frontend
from server.service.generation import Generation, all_of
from server.service.question_sets import QuestionSets
from server.service.registry import Resolved

_SEED_BYTES = 6  # of the seed of a sampled item; JSON numbers hold them exactly


@dataclass(frozen=True)
class AblationSpec:
    """An ablation as a client asks for it; `Ablations.prepare` checks it.

    Args:
        settings: the variants and how they are judged.
        caller: who asks.
        question_set: name of a question set; or None, and `questions` is given.
        questions: inline questions; or None, and `question_set` is given.
        tasks: ask only the questions of these tasks; None: all.
        temperature: of sampling; 0 is greedy.
        timeout_s: deadline of each item in seconds; None: the server's.
        background: whether it runs as a job, with no limit on the number of items.
        provenance: that of an earlier run, which must be this run's as well; None: any.
        as_sent: the request as JSON, with the fields that were sent only.
    """

    settings: AblationSettings
    caller: Caller
    question_set: str | None = None
    questions: Sequence[Question] | None = None
    tasks: Sequence[str] | None = None
    temperature: float = 0.0
    timeout_s: float | None = None
    background: bool = False
    provenance: Mapping[str, Any] | None = None
    as_sent: Mapping[str, Any] = field(default_factory=dict)


class Ablations:
    """The ablations of one app: their jobs, their question sets, and their share of the engine.

    Args:
        frontend: submits the generations.

    Attributes:
        jobs: ablations in the background.
        question_sets: the sets that can be asked by name.
    """

    def __init__(self, frontend: Frontend) -> None:
        settings = frontend.settings
        kept = settings.evaluations
        self.jobs = jobs.Jobs(
            kept / "ablations", settings.max_ablation_jobs, settings.max_ablation_kept
        )
        self.question_sets = QuestionSets(settings.store / "question_sets", kept / "question_sets")
        self._frontend = frontend
        # Items in the engine at once, of all ablations together.
        self._slots = asyncio.Semaphore(settings.max_ablation_inflight)

    def load(self) -> None:
        """Read the records of earlier jobs."""
        self.jobs.load()

    async def stop(self) -> None:
        """Interrupt the jobs that still run."""
        await self.jobs.stop()

    async def prepare(self, spec: AblationSpec) -> "Ablation":
        """Resolve and check everything that an ablation needs.

        Raises:
            ConfigError: the questions, the scorer or a variant are not allowed.
            StoreError: an adapter is missing or does not fit.
            InvalidField: over a limit of the server.
            InvalidConstraint: the choices are none that the engine can keep to.
            DigestMismatch: something else would answer than in `spec.provenance`.
        """
        question_set = await asyncio.to_thread(self._question_set, spec)
        questions = question_set.questions
        await asyncio.to_thread(spec.settings.check, questions)
        adapters = _Adapters(self._frontend, spec)
        work = plan(questions, spec.settings, adapters.select)
        if not spec.background:
            num_item_variants = len(questions) * len(spec.settings.variants)
            _check_size(num_item_variants, self._frontend.settings.max_ablation_direct)
        for constraint in {_constraint(spec.settings, question) for question in questions}:
            if constraint is not None:
                await self._frontend.engine.check(constraint)
        provenance = adapters.provenance(question_set.digest)
        if spec.provenance is not None:
            _check_provenance(provenance, spec.provenance)
        return Ablation(
            spec, question_set, work, adapters.resolved, provenance, self._frontend, self._slots
        )

    async def start(self, ablation: "Ablation") -> jobs.Job:
        """Run an ablation in the background. Raises as `Jobs.start`."""
        total = len(ablation.plan.jobs)
        return await self.jobs.start(
            ablation.id, ablation.request(), total, ablation.run, owner=ablation.spec.caller.name
        )

    def job(self, id: str, caller: Caller) -> jobs.Job:
        """A background ablation of this caller. Raises NotFound, also for that of another."""
        job = self.jobs.get(id)
        if not caller.may_see(job.owner):
            raise jobs.no_job(id)
        return job

    def _question_set(self, spec: AblationSpec) -> QuestionSet:
        """Return the inline questions or those of a named set, filtered by task."""
        if spec.questions is not None:
            question_set = inline_question_set(spec.questions)
        else:
            question_set = self.question_sets.read(spec.question_set or "")
        return question_set.for_tasks(spec.tasks) if spec.tasks else question_set


@dataclass(frozen=True)
class Ablation:
    """An ablation that is ready to run.

    Args:
        spec: what was asked for.
        question_set: the questions.
        plan: the generations.
        resolved: (task, selection) -> its adapters, in the task's prompt format.
        provenance: digests of everything that will answer.
        frontend: submits the generations.
        slots: bounds the items in the engine at once, of all ablations together.
        id: names the ablation, and its job if it runs in the background.
    """

    spec: AblationSpec
    question_set: QuestionSet
    plan: AblationPlan
    resolved: Mapping[tuple[str, AdapterSelection], Resolved]
    provenance: dict[str, Any]
    frontend: Frontend
    slots: asyncio.Semaphore
    id: str = field(default_factory=lambda: f"abl-{uuid.uuid4().hex}")

    def request(self) -> dict[str, Any]:
        """Return the request with its provenance: sent again, the same adapters answer, or none."""
        return {**self.spec.as_sent, "provenance": self.provenance}

    async def run(self, count: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Run every generation and return the body of the answer.

        If the caller is cancelled, the engine aborts the running generations.

        Args:
            count: called after each job of the plan.
        """
        started = time.monotonic()
        outcomes = [ItemResult("failed")] * len(self.plan.jobs)
        # All workers draw from one iterator: the variants of an item are neighbours in it, so they
        # run at the same time and share batches.
        remaining = iter(enumerate(self.plan.jobs))

        async def work() -> None:
            for index, job in remaining:
                async with self.slots:
                    outcomes[index] = await self._outcome(job)
                count()

        num_workers = self.frontend.settings.max_ablation_inflight
        await all_of(work() for _ in range(num_workers))
        rows = self.plan.by_variant(outcomes)
        settings = self.spec.settings
        answer = await asyncio.to_thread(body, self.question_set, settings, rows, self.provenance)
        variants = answer["variants"].items()
        self.frontend.metrics.set_ablation({name: row.get("accuracy") for name, row in variants})
        return {"id": self.id, **answer, "wall_s": round(time.monotonic() - started, 4)}

    async def _outcome(self, job: Job) -> ItemResult:
        """Answer one job as the scorer needs; if it fails, the failure is its outcome."""
        await self.frontend.quotas.until_tokens(self.spec.caller)  # no part of the item's time
        question = self.question_set.questions[job.question]
        scorer = self.spec.settings.scorer
        timeout_s = self.spec.timeout_s or self.frontend.settings.request_timeout_s
        item = _Item(
            self.frontend,
            question.question,
            self.resolved[question.task, job.selection],
            raw=self.spec.settings.raw,
            deadline=time.monotonic() + timeout_s,
        )
        texts = continuations(scorer, question.answers, question.choices)
        try:
            if not texts:
                return ItemResult("scored", await item.text(self._sampling(question, job)))
            # One after the other: all but the first find the question in the prefix cache.
            likelihoods = [await item.likelihood(text) for text in texts]
            return of_likelihoods(scorer, texts, likelihoods)
        except DeadlineExceeded as error:
            return ItemResult("timed_out", error=error.message)
        except (AdapterUnloaded, GenerationFailed, PromptTooLong) as error:
            return ItemResult("failed", error=str(error))

    def _sampling(self, question: Question, job: Job) -> SamplingParams:
        """Sample with a seed of the item's own, whatever the other items are."""
        settings = self.spec.settings
        name = f"{settings.seed} {job.nth} {question.id}"
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:_SEED_BYTES])
        return SamplingParams(
            settings.max_tokens,
            self.spec.temperature,
            seed=seed,
            constraint=_constraint(settings, question),
        )


@dataclass(frozen=True)
class _Item:
    """One question under one selection, with the deadline of all its generations.

    Args:
        frontend: submits the generations.
        prompt: the question.
        resolved: the adapters, and the prompt format.
        raw: whether the question is sent without that format.
        deadline: in seconds of time.monotonic().
    """

    frontend: Frontend
    prompt: str
    resolved: Resolved
    raw: bool
    deadline: float

    async def text(self, sampling: SamplingParams) -> str:
        """Generate an answer. Raises as `_finished`."""
        generation = await self._finished(sampling)
        return generation.sequences[0].text

    async def likelihood(self, answer: str) -> Likelihood:
        """Measure how likely a given answer is. Raises as `_finished`."""
        generation = await self._finished(SamplingParams(1), answer)
        logprobs = [each.logprob for each in generation.prompt_logprobs]
        return Likelihood(sum(logprobs), len(logprobs))

    async def _finished(self, sampling: SamplingParams, answer: str | None = None) -> Generation:
        """Run one generation to its end, retrying while the queue is full.

        Raises:
            DeadlineExceeded: the deadline passed, in the queue or before it.
            AdapterUnloaded, GenerationFailed, PromptTooLong: the generation failed.
            Draining, EngineStopped: the server is stopping.
        """
        while True:
            left = self.deadline - time.monotonic()
            if left <= 0:
                message = "the queue was full until the deadline"
                raise DeadlineExceeded(message, field="timeout_s")
            try:
                generation = await self.frontend.generation(
                    self.prompt,
                    self.resolved,
                    sampling,
                    raw=self.raw,
                    timeout_s=left,
                    prefix="abl",
                    answer=answer,
                    interactive=False,
                )
                await generation.finished()
                return generation
            except QueueFull as error:
                await asyncio.sleep(min(left, error.retry_after))


class _Adapters:
    """Resolves the adapters of variants, and records which were used.

    Attributes:
        resolved: (task, selection) -> the adapters, in the task's prompt format.
    """

    def __init__(self, frontend: Frontend, spec: AblationSpec) -> None:
        self.resolved: dict[tuple[str, AdapterSelection], Resolved] = {}
        self._frontend = frontend
        self._spec = spec
        self._tasks: dict[str, str | None] = {}  # name, or name@version -> digest
        self._backbones: dict[str, str | None] = {}  # "crma", or "crma@version" -> digest

    def select(self, variant: str, task: str) -> AdapterSelection:
        """Resolve a variant for a task. Raises as `Frontend.resolve` and `Frontend.check`."""
        cell = read_cell(variant)
        spec = self._spec
        name = f"{task}@{cell.task_version}" if cell.task_version else task
        found = self._frontend.resolve(
            name if cell.task else None, cell.crma, cell.crma_version, caller=spec.caller
        )
        if not cell.task:
            found = replace(found, prompt_format=self._format_of(task) or found.prompt_format)
        needs_format = not spec.settings.raw
        timeout_s = spec.timeout_s
        self._frontend.check(found, SamplingParams(), timeout_s, needs_format=needs_format)
        self.resolved[task, found.selection] = found
        if cell.task:
            self._tasks[name] = found.selection.task_digest
        if cell.crma:
            backbone = f"crma@{cell.crma_version}" if cell.crma_version else "crma"
            self._backbones[backbone] = found.selection.crma_digest
        return found.selection

    def _format_of(self, task: str) -> Format | None:
        """Return the format in which every variant is asked about a task; None if it has none.

        Otherwise variants without the task's adapter would differ from it by the prompt too.
        """
        try:
            return self._frontend.registry.task(task, self._spec.caller).prompt_format
        except StoreError:  # no such task, or a damaged one: variants without it can still answer
            return None

    def provenance(self, question_set: str) -> dict[str, Any]:
        """Return the digests of everything that was selected and of the question set; and choices.

        What the choices are decides the answers as much as an adapter does.
        """
        settings = self._spec.settings
        serving = self._backbones.get("crma")
        versions: dict[str, Any] = {}
        versions.update((name, each) for name, each in self._backbones.items() if name != "crma")
        if settings.choices:
            choices = settings.choices
            versions["choices"] = choices if choices == "own" else list(choices)
        return self._frontend.provenance(
            settings.seed, serving, question_set=question_set, tasks=self._tasks, **versions
        )


def _constraint(settings: AblationSettings, question: Question) -> Constraint | None:
    """The constraint on the answer to a question; None: any text."""
    choices = settings.choices_of(question)
    if not choices:
        return None
    return Constraint(ConstraintKind.CHOICE, json.dumps(choices), field="choices")


def _check_size(num_item_variants: int, limit: int) -> None:
    """Raise InvalidField if an ablation is too large to be answered directly.

    Items count once for each variant, whether or not variants share their answers.
    """
    if num_item_variants > limit:
        raise InvalidField(
            f'over {limit} item-variants need "background": true',
            field="questions",
            value=num_item_variants,
            allowed=f"<= {limit} item-variants",
        )


def _check_provenance(provenance: Mapping[str, Any], earlier: Mapping[str, Any]) -> None:
    """Raise DigestMismatch if something else would answer than in an earlier run."""
    names = {**provenance, **earlier}
    differ = [name for name in names if provenance.get(name) != earlier.get(name)]
    if differ:
        advice = "name the versions in variants, or leave provenance out"
        message = f"{', '.join(differ)}: not the same as in the earlier run; {advice}"
        allowed = [provenance.get(name) for name in differ]
        raise DigestMismatch(message, field="provenance", value=differ, allowed=allowed)
