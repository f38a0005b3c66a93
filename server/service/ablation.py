"""Ablations through the engine: everything is checked before anything runs, then item by item."""

import asyncio
import hashlib
import json
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Connection

from crma.access.scope import Scope
from crma.core.selection import AdapterSelection
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
from server.engine.errors import PromptTooLong, QueueFull
from server.engine.request import Constraint, ConstraintKind, SamplingParams
from server.service import audit, jobs, usage
from server.service.ablation_adapters import AblationAdapters, check_provenance
from server.service.ablation_spec import AblationSpec, read_spec, write_spec
from server.service.caller import Caller
from server.service.errors import (
    AdapterUnloaded,
    DeadlineExceeded,
    GenerationFailed,
    InvalidField,
    ReplicaLost,
)
from server.service.frontend import Frontend
from server.service.generation import Generation, all_of, already_begun
from server.service.job_runner import JobLimits, JobRunner, RunningJob
from server.service.old_files import import_files
from server.service.question_sets import QuestionSets
from server.service.registry import Resolved
from server.settings import Settings

_SEED_BYTES = 6  # of the seed of a sampled item; JSON numbers hold them exactly
_OUTCOME = TypeAdapter(ItemResult)
Keep = Callable[[int, ItemResult], Awaitable[None]]


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
        database = frontend.database
        limits = JobLimits(
            settings.max_ablation_jobs,
            settings.max_ablation_queue,
            settings.max_ablation_kept,
            settings.ablation_kept_s,
        )
        self._runner = JobRunner(
            database,
            frontend.model.digest,
            self._run_job,
            self._is_ready,
            limits,
            also_clean=partial(_remove_old, settings),
        )
        self.jobs = jobs.Jobs(self._runner)
        self.question_sets = QuestionSets(
            frontend.registry.store.root / "question_sets", database, settings.max_question_sets
        )
        self._frontend = frontend
        # Items in the engine at once, of all ablations together.
        self._slots = asyncio.Semaphore(settings.max_ablation_inflight)

    async def start(self) -> None:
        """Take over what an older release kept in files, and run jobs from now on."""
        frontend = self._frontend
        await import_files(frontend.settings.evaluations, frontend.database)
        self._runner.start()

    async def stop(self) -> None:
        """Stop the jobs that run here; another server, or the next start, goes on with them."""
        await self._runner.stop()
        await self.question_sets.stop()

    def _is_ready(self) -> bool:
        return self._frontend.not_ready() is None

    async def prepare(self, spec: AblationSpec, caller: Caller) -> "Ablation":
        """Resolve and check everything that an ablation needs.

        Args:
            spec: what is asked for.
            caller: the spec's owner, with what its key may do now.

        Raises:
            ConfigError: the questions, the scorer or a variant are not allowed.
            StoreError: an adapter is missing or does not fit.
            InvalidField: over a limit of the server.
            InvalidConstraint: the choices are none that the engine can keep to.
            DigestMismatch: something else would answer than in `spec.provenance`.
            RecordsError: the question set cannot be read.
        """
        question_set = await self._question_set(spec)
        questions = question_set.questions
        if not spec.background:
            num_item_variants = len(questions) * len(spec.settings.variants)
            _check_size(num_item_variants, self._frontend.settings.max_ablation_direct)
        await asyncio.to_thread(spec.settings.check, questions)
        adapters = AblationAdapters(self._frontend, spec, caller)
        work = await asyncio.to_thread(plan, questions, spec.settings, adapters.select)
        for constraint in {_constraint(spec.settings, question) for question in questions}:
            if constraint is not None:
                await self._frontend.engine.check(constraint)
        provenance = adapters.provenance(question_set.digest)
        if spec.provenance is not None:
            check_provenance(provenance, spec.provenance)
        fixed = replace(spec, provenance=provenance, versions=adapters.versions)
        return Ablation(
            fixed,
            caller,
            question_set,
            work,
            adapters.resolved,
            provenance,
            self._frontend,
            self._slots,
        )

    async def start_job(self, ablation: "Ablation") -> None:
        """Run an ablation in the background. Raises as `Jobs.start`."""
        spec = await asyncio.to_thread(write_spec, replace(ablation.spec, as_sent={}))
        num_items = len(ablation.plan.jobs)
        request = ablation.request()
        await self.jobs.start(ablation.id, ablation.spec.owner, request, spec, num_items)

    async def _run_job(self, running: RunningJob) -> dict[str, Any]:
        """Run the rest of a job from its spec.

        Raises as `Keys.current`, `prepare` and `running.keep`.
        """
        spec = await asyncio.to_thread(read_spec, running.job.spec)
        caller = self._frontend.keys.current(Caller(spec.owner), Scope.ABLATE)
        ablation = replace(await self.prepare(spec, caller), id=running.job.id)
        finished = await asyncio.to_thread(_read_outcomes, running.outcomes)

        async def keep(index: int, outcome: ItemResult) -> None:
            await running.keep(index, _OUTCOME.dump_python(outcome, mode="json"))

        return await ablation.run(finished, keep)

    async def _question_set(self, spec: AblationSpec) -> QuestionSet:
        """Return the inline questions or those of a named set, filtered by task."""
        if spec.questions is not None:
            question_set = await asyncio.to_thread(inline_question_set, spec.questions)
        else:
            question_set = await self.question_sets.read(spec.question_set or "", spec.owner)
        if not spec.tasks:
            return question_set
        return await asyncio.to_thread(question_set.for_tasks, spec.tasks)


@dataclass(frozen=True)
class Ablation:
    """An ablation that is ready to run.

    Args:
        spec: what was asked for.
        caller: who asks.
        question_set: the questions.
        plan: the generations.
        resolved: (task, selection) -> its adapters, in the task's prompt format.
        provenance: digests of everything that will answer.
        frontend: submits the generations.
        slots: bounds the items in the engine at once, of all ablations together.
        id: names the ablation, and its job if it runs in the background.
    """

    spec: AblationSpec
    caller: Caller
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

    async def run(
        self, finished: Mapping[int, ItemResult] = {}, keep: Keep | None = None
    ) -> dict[str, Any]:
        """Run every generation and return the body of the answer.

        If the caller is cancelled, the engine aborts the running generations.

        Args:
            finished: index -> outcome, of jobs of the plan that ran before and do not run again.
            keep: called after each job of the plan with its index and outcome.
        """
        started = time.monotonic()
        outcomes = [finished.get(i, ItemResult("failed")) for i in range(len(self.plan.jobs))]
        # All workers draw from one iterator: the variants of an item are neighbours in it, so they
        # run at the same time and share batches.
        remaining = (each for each in enumerate(self.plan.jobs) if each[0] not in finished)

        async def work() -> None:
            for index, job in remaining:
                async with self.slots:
                    outcomes[index] = await self._outcome(job)
                if keep is not None:
                    await keep(index, outcomes[index])

        num_workers = self.frontend.settings.max_ablation_inflight
        with already_begun():
            await all_of(work() for _ in range(num_workers))
        rows = self.plan.by_variant(outcomes)
        settings = self.spec.settings
        answer = await asyncio.to_thread(body, self.question_set, settings, rows, self.provenance)
        variants = answer["variants"].items()
        self.frontend.metrics.set_ablation({name: row.get("accuracy") for name, row in variants})
        return {"id": self.id, **answer, "wall_s": round(time.monotonic() - started, 4)}

    async def _outcome(self, job: Job) -> ItemResult:
        """Answer one job as the scorer needs; if it fails, the failure is its outcome."""
        current = partial(self.frontend.keys.current, self.caller, Scope.ABLATE)
        await self.frontend.quotas.until_tokens(current)  # no part of the item's time
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
        except (AdapterUnloaded, GenerationFailed, PromptTooLong, ReplicaLost) as error:
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
            AdapterUnloaded, GenerationFailed, PromptTooLong, ReplicaLost: the generation failed.
            STOPPING: the server is stopping.
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


def _remove_old(settings: Settings, connection: Connection) -> None:
    """Remove the acts and the usage that are not kept any longer."""
    audit.remove_old(connection, settings.audit_kept_s)
    usage.remove_old(connection, settings.usage_kept_s)


def _read_outcomes(content: Mapping[int, Any]) -> dict[int, ItemResult]:
    """Read the outcomes that a job kept, by index."""
    return {index: _OUTCOME.validate_python(each) for index, each in content.items()}


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
