"""A base model with the adapters of a store, without a server: for `crma ablate` and the gate."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

from crma.core.errors import ConfigError, NotFound
from crma.core.provenance import commit, hardware
from crma.core.selection import VARIANTS, AdapterSelection, read_cell
from crma.data.splits import load_split
from crma.evaluation.ablation import AblationSettings, ItemResult, Job, of_likelihoods, plan
from crma.evaluation.baselines import naive_bayes
from crma.evaluation.evaluator import Encoded, Evaluator
from crma.evaluation.question_set import Question, QuestionSet, inline_question_set
from crma.evaluation.report import body
from crma.evaluation.scorers import continuations
from crma.method.backbone import FoldedPair
from crma.method.injection import Injection, Plan
from crma.method.lora import Lora
from crma.models.base_model import BaseModel
from crma.models.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from crma.models.model_shape import ModelShape
from crma.models.prompts import AsSent, base_format, encode_text
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry
from crma.store.serving import check_selection

Note = Callable[[str], None]
_Answerer = Callable[[str, Sequence[Question]], Sequence[ItemResult]]  # (task, its questions)


class Served:
    """A base model with the serving adapters of a store, which are loaded on first use.

    Args:
        base: the base model.
        store: holds the adapters.
        device: a torch device; "auto" is the server's choice.
        dtype: of the model and the adapters; "auto" is the server's choice.
    """

    def __init__(
        self, base: BaseModel, store: AdapterStore, *, device: str = "auto", dtype: str = "auto"
    ) -> None:
        self.base = base
        self.store = store
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.injection = Injection(load_model(base, self.device, self.dtype))
        self.shape = ModelShape.of(self.injection.model)
        self.tokenizer = load_tokenizer(base)
        self._loras: dict[str, Lora] = {}  # by digest
        self._backbones: dict[str, list[FoldedPair]] = {}  # by digest

    def with_store(self, store: AdapterStore) -> "Served":
        """Return the same model with the adapters of another store."""
        other = copy(self)
        other.store = store
        return other

    def lora(self, entry: TaskEntry) -> Lora:
        """Return a task adapter in the serving dtype."""
        if entry.digest not in self._loras:
            lora = entry.load(self.shape)
            self._loras[entry.digest] = self.injection.bind(lora.to(self.device, self.dtype))
        return self._loras[entry.digest]

    def backbone(self, entry: BackboneEntry) -> list[FoldedPair]:
        """Return a backbone folded into low-rank pairs in the serving dtype."""
        if entry.digest not in self._backbones:
            backbone = entry.load(self.shape)
            self._backbones[entry.digest] = backbone.folded(self.device, self.dtype)
        return self._backbones[entry.digest]

    def entries(self, variant: str, task: str) -> tuple[TaskEntry | None, BackboneEntry | None]:
        """Return the store entries that a variant uses for a task.

        Raises:
            ConfigError: the variant needs a backbone and none serves.
            StoreError: an adapter is missing, or the adapters do not belong together.
        """
        cell = read_cell(variant)
        entry = self.store.task(task, cell.task_version) if cell.task else None
        backbone = self.store.backbone(cell.crma_version) if cell.crma else None
        if cell.crma and backbone is None:
            without = [other for other in VARIANTS if "crma" not in other]
            message = f"Variant {variant!r} needs a backbone, and none serves."
            raise ConfigError(message, field="variants", value=variant, allowed=without)
        check_selection(entry, backbone, self.base.digest)
        return entry, backbone

    def selection(self, variant: str, task: str) -> AdapterSelection:
        """Return the digests that a variant uses for a task. Raises as `entries`."""
        entry, backbone = self.entries(variant, task)
        task_digest = entry.digest if entry else None
        crma_digest = backbone.digest if backbone else None
        return AdapterSelection(task_digest, crma_digest)

    def plan(self, variant: str, task: str, strength: float = 1.0) -> Plan:
        """Return a plan that applies one variant to every row. Raises as `entries`.

        Args:
            variant: its name.
            task: the task whose adapter it uses.
            strength: factor on the backbone's update: 0 is off, 1 is on.
        """
        entry, backbone = self.entries(variant, task)
        loras = [(None, self.lora(entry))] if entry else []
        if backbone is None:
            return Plan(loras)
        pairs = self.backbone(backbone)
        if strength != 1:
            pairs = [FoldedPair(pair.A, pair.B * strength) for pair in pairs]
        return Plan(loras, [(None, pairs)])

    def evaluator(self, task: str | TaskEntry, *, raw: bool = False) -> Evaluator:
        """Return an evaluator in the prompt format of the task.

        It is the format the task was trained with, or the chat template if the store has no such
        task or no format for it.

        Args:
            task: its name, or one version of it.
            raw: send prompts as they are; answers still end as they do in that format.

        Raises:
            ConfigError: there is neither a format nor a chat template, and not `raw`.
        """
        try:
            entry = self.store.task(task) if isinstance(task, str) else task
            recorded = entry.prompt_format
        except NotFound:
            recorded = None
        try:
            fmt = recorded or base_format(self.tokenizer, raw=raw)
        except ConfigError as error:
            message = f"{error.message}: ask raw questions (--raw)"
            raise ConfigError(message, field="raw", value=raw, allowed=True) from error
        return Evaluator(self.injection, self.tokenizer, AsSent(fmt) if raw else fmt)

    def answers(
        self, task: str, plan: Plan, prompts: Sequence[str], max_tokens: int, *, raw: bool = False
    ) -> list[str]:
        """Return the greedy answers to prompts of a task under one plan. Raises as `evaluator`."""
        return self.evaluator(task, raw=raw).answers(plan, prompts, max_tokens=max_tokens)

    def outcomes(
        self, task: str, plan: Plan, questions: Sequence[Question], settings: AblationSettings
    ) -> list[ItemResult]:
        """Answer a task's questions under one plan, as the scorer needs.

        Returns:
            [questions] greedy answers, or the likeliest of the texts that the scorer compares.
        """
        scorer = settings.scorer
        texts = [continuations(scorer, each.answers, each.choices) for each in questions]
        if not any(texts):
            prompts = [question.question for question in questions]
            answers = self.answers(task, plan, prompts, settings.max_tokens, raw=settings.raw)
            return [ItemResult("scored", answer) for answer in answers]
        evaluator = self.evaluator(task, raw=settings.raw)
        rows = []
        for question, texts_of_question in zip(questions, texts, strict=True):
            prompt = evaluator.fmt.encode(self.tokenizer, question.question)
            given = [encode_text(self.tokenizer, text) for text in texts_of_question]
            rows += [Encoded(prompt, answer) for answer in given]
        likelihoods = evaluator.likelihoods(plan, rows)
        results = []
        start = 0
        for texts_of_question in texts:
            end = start + len(texts_of_question)
            results.append(of_likelihoods(scorer, texts_of_question, likelihoods[start:end]))
            start = end
        return results


def split_questions(sources: Mapping[str, str], split: str) -> QuestionSet:
    """Return a split of some tasks as a question set.

    Args:
        sources: task -> its built-in domain, or its folder.
        split: train, validation or holdout.

    Raises:
        DataError: a split is missing or damaged.
    """
    questions = []
    for task, source in sources.items():
        for i, example in enumerate(load_split(source, split), start=1):
            answers = [example.completion]
            question = {"task": task, "question": example.prompt, "answers": answers}
            questions.append({"id": f"{task}-{i:03}"} | question)
    return inline_question_set(questions, name=split)


def ablate(
    served: Served,
    question_set: QuestionSet,
    settings: AblationSettings,
    *,
    control: AdapterStore | None = None,
    strengths: Sequence[float] = (),
    naive_bayes_of: Mapping[str, str] | None = None,
    note: Note,
) -> dict[str, Any]:
    """Compute the body of POST /ablation without a server, greedily, with further rows.

    Args:
        served: the model and its adapters.
        question_set: the questions.
        settings: the variants and how they are judged.
        control: a store of LoRAs trained without CRMA, for the row "control". It is the fair
            counterfactual: a LoRA trained with CRMA misses it when CRMA is off.
        strengths: of the injection, for rows such as "task+crma x0.25"; 0 is off and 1 is on.
        naive_bayes_of: task -> its built-in domain or its folder; adds the row "naive_bayes", a
            classifier of each task's training split. Only for scorers that judge a text.
        note: called with a line of progress.

    Raises:
        ConfigError: the settings do not fit the questions or need a server, or a variant needs a
            missing backbone.
        StoreError: an adapter is missing or does not fit. It is raised before anything runs,
            unless the adapter is the control's.
        DataError: naive Bayes has no training split.
    """
    questions = question_set.questions
    settings.check(questions)
    if settings.choices:
        message = "choices: answers are constrained on a server only; ask POST /ablation."
        raise ConfigError(message, field="choices", value=settings.choices, allowed=())
    variant_of: dict[tuple[str, AdapterSelection], str] = {}

    def select(variant: str, task: str) -> AdapterSelection:
        selection = served.selection(variant, task)
        variant_of.setdefault((task, selection), variant)
        return selection

    work = plan(questions, settings, select)
    outcomes = _run(served, work.jobs, questions, settings, variant_of, note)
    rows: dict[str, Sequence[ItemResult]] = dict(work.by_variant(outcomes))
    answerers = _further_rows(served, settings, control, strengths)
    if naive_bayes_of is not None:
        answerers["naive_bayes"] = partial(_by_naive_bayes, naive_bayes_of)
    for label, answer in answerers.items():
        rows[label] = _by_task(label, answer, questions, note)
    return body(question_set, settings, rows, _provenance(served, questions, settings.seed))


def _run(
    served: Served,
    jobs: Sequence[Job],
    questions: Sequence[Question],
    settings: AblationSettings,
    variant_of: Mapping[tuple[str, AdapterSelection], str],
    note: Note,
) -> list[ItemResult]:
    """Run the jobs of each task and selection as one batched call.

    Args:
        served: the model and its adapters.
        jobs: those of a plan.
        questions: what their indices mean.
        settings: the scorer and the length limit.
        variant_of: (task, selection) -> the name of a variant that resolves to it.
        note: called with a line per group of jobs.

    Returns:
        [jobs] outcomes.
    """
    groups: dict[tuple[str, AdapterSelection, int], list[int]] = {}
    for index, job in enumerate(jobs):
        task = questions[job.question].task
        groups.setdefault((task, job.selection, job.nth), []).append(index)
    outcomes = [ItemResult("failed")] * len(jobs)
    for (task, selection, _), indices in groups.items():
        variant = variant_of[task, selection]
        asked = [questions[jobs[index].question] for index in indices]
        note(f"{task}, {variant}: {len(asked)} questions")
        found = served.outcomes(task, served.plan(variant, task), asked, settings)
        for index, outcome in zip(indices, found, strict=True):
            outcomes[index] = outcome
    return outcomes


def _further_rows(
    served: Served,
    settings: AblationSettings,
    control: AdapterStore | None,
    strengths: Sequence[float],
) -> dict[str, _Answerer]:
    """Return label -> answerer of the rows beyond the variants that ask the language model."""

    def answerer(asked: Served, variant: str, strength: float = 1.0) -> _Answerer:
        def answer(task: str, questions: Sequence[Question]) -> list[ItemResult]:
            return asked.outcomes(task, asked.plan(variant, task, strength), questions, settings)

        return answer

    rows = {f"task+crma x{each:g}": answerer(served, "task+crma", each) for each in strengths}
    if control is not None:
        rows["control"] = answerer(served.with_store(control), "task")
    return rows


def _by_naive_bayes(
    sources: Mapping[str, str], task: str, questions: Sequence[Question]
) -> list[ItemResult]:
    """Answer with a classifier of the task's training split. Raises DataError."""
    prompts = [question.question for question in questions]
    answers = naive_bayes(load_split(sources[task], "train"), prompts)
    return [ItemResult("scored", answer) for answer in answers]


def _by_task(
    label: str, answer: _Answerer, questions: Sequence[Question], note: Note
) -> list[ItemResult]:
    """Return a row of outcomes [questions], answered task by task."""
    outcomes: dict[str, ItemResult] = {}
    for task in _tasks(questions):
        asked = [question for question in questions if question.task == task]
        note(f"{task}, {label}: {len(asked)} questions")
        ids = [question.id for question in asked]
        outcomes.update(zip(ids, answer(task, asked), strict=True))
    return [outcomes[question.id] for question in questions]


def _tasks(questions: Sequence[Question]) -> list[str]:
    """Return the tasks of the questions, each once, in order."""
    return list(dict.fromkeys(question.task for question in questions))


def _provenance(served: Served, questions: Sequence[Question], seed: int) -> dict[str, Any]:
    """Return the digests of what serves, and where and with what code it ran."""
    backbone = served.store.backbone()
    known = served.store.task_names()
    tasks = [task for task in _tasks(questions) if task in known]
    return {
        "base": served.base.digest,
        "backbone": backbone.digest if backbone else None,
        "tasks": {task: served.store.task(task).digest for task in tasks},
        "dtype": str(served.dtype).removeprefix("torch."),
        "seed": seed,
        "hardware": hardware(),
        "commit": commit(),
    }
