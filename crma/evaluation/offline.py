"""A base model with the adapters of a store, without a server: what `crma ablate` and the gate ask."""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

from crma.core.errors import ConfigError, NotFound
from crma.core.provenance import commit, hardware
from crma.core.selection import VARIANTS, AdapterSelection, read_cell
from crma.data.splits import load_split
from crma.evaluation.ablation import ItemResult, check_settings, of_likelihoods, plan, report
from crma.evaluation.baselines import naive_bayes
from crma.evaluation.evaluator import Encoded, Evaluator
from crma.evaluation.question_set import Question, QuestionSet, inline_question_set
from crma.evaluation.scorers import continuations
from crma.method.backbone import FoldedPair
from crma.method.injection import Injection, Plan
from crma.method.lora import Lora
from crma.models.base_model import BaseModel
from crma.models.loading import load_model, load_tokenizer, resolve_device, resolve_dtype
from crma.models.model_shape import ModelShape
from crma.models.prompts import chat_format, encode_text
from crma.store.adapter_store import AdapterStore
from crma.store.entry import BackboneEntry, TaskEntry

Note = Callable[[str], None]
Answerer = Callable[[str, list[Question]], list[ItemResult]]  # of a task


class Served:
    """The model, and the store's serving adapters as they are asked for.

    Args:
        dtype: "auto" is what the server serves in.
    """

    def __init__(
        self, base: BaseModel, store: AdapterStore, *, device: str = "auto", dtype: str = "auto"
    ) -> None:
        self.base = base
        self.store = store
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.injection = Injection(load_model(base, self.device, self.dtype))
        self.tokenizer = load_tokenizer(base)
        self.shape = ModelShape.of(self.injection.model)
        self._loaded: dict[str, Any] = {}

    def with_store(self, store: AdapterStore) -> "Served":
        """The same model with other adapters."""
        other = copy(self)
        other.store = store
        return other

    def lora(self, entry: TaskEntry) -> Lora:
        """As it serves; read once."""
        if entry.digest not in self._loaded:
            self._loaded[entry.digest] = entry.load(self.shape).to(self.device, self.dtype)
        return self._loaded[entry.digest]

    def backbone(self, entry: BackboneEntry) -> list[FoldedPair]:
        """As it serves; read once."""
        if entry.digest not in self._loaded:
            self._loaded[entry.digest] = entry.load(self.shape).folded(self.device, self.dtype)
        return self._loaded[entry.digest]

    def entries(self, variant: str, task: str) -> tuple[TaskEntry | None, BackboneEntry | None]:
        """What serves a variant. Raises StoreError, or ConfigError where it needs a backbone and none serves."""
        cell = read_cell(variant)
        entry = self.store.task(task, cell.task_version) if cell.task else None
        backbone = self.store.backbone(cell.crma_version) if cell.crma else None
        if cell.crma and backbone is None:
            without = [other for other in VARIANTS if "crma" not in other]
            message = f"Variant {variant!r} needs a backbone, and none serves."
            raise ConfigError(message, field="variants", value=variant, allowed=without)
        self.store.check_selection(entry, backbone, self.base.digest)
        return entry, backbone

    def selection(self, variant: str, task: str) -> AdapterSelection:
        """Digests of a variant for a task. Raises as `entries`."""
        entry, backbone = self.entries(variant, task)
        return AdapterSelection(
            entry.digest if entry else None, backbone.digest if backbone else None
        )

    def plan(self, variant: str, task: str, strength: float = 1.0) -> Plan:
        """Every row under one variant, what the backbone adds multiplied by `strength`. Raises as `entries`."""
        entry, backbone = self.entries(variant, task)
        loras = [(None, self.lora(entry))] if entry else []
        if backbone is None:
            return Plan(loras)
        pairs = self.backbone(backbone)
        if strength != 1:
            pairs = [FoldedPair(pair.A, pair.B * strength) for pair in pairs]
        return Plan(loras, [(None, pairs)])

    def evaluator(self, task: str | TaskEntry) -> Evaluator:
        """In the format that the task was trained with, else the chat template."""
        try:
            recorded = (self.store.task(task) if isinstance(task, str) else task).prompt_format
        except NotFound:
            recorded = None
        return Evaluator(self.injection, self.tokenizer, recorded or chat_format(self.tokenizer))

    def answers(self, task: str, plan: Plan, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers under one plan."""
        return self.evaluator(task).answers(plan, prompts, max_tokens=max_tokens)

    def outcomes(
        self, task: str, plan: Plan, questions: Sequence[Question], scorer: str, max_tokens: int
    ) -> list[ItemResult]:
        """What the scorer needs of each question: a greedy answer, or the likeliest of given ones."""
        texts = [
            continuations(scorer, question.answers, question.choices) for question in questions
        ]
        if not any(texts):
            answers = self.answers(
                task, plan, [question.question for question in questions], max_tokens
            )
            return [ItemResult("scored", text) for text in answers]
        evaluator = self.evaluator(task)
        rows = [
            Encoded(
                evaluator.fmt.encode(self.tokenizer, question.question),
                encode_text(self.tokenizer, text),
            )
            for question, of_question in zip(questions, texts, strict=True)
            for text in of_question
        ]
        found = iter(evaluator.likelihoods(plan, rows))
        return [of_likelihoods(scorer, each, [next(found) for _ in each]) for each in texts]


def split_questions(tasks: Sequence[str], split: str) -> QuestionSet:
    """A split of built-in tasks as a question set. Raises DataError."""
    questions = [
        {
            "id": f"{task}-{i:03}",
            "task": task,
            "question": example.prompt,
            "answers": [example.completion],
        }
        for task in tasks
        for i, example in enumerate(load_split(task, split), start=1)
    ]
    return inline_question_set(questions, name=split)


def ablate(
    served: Served,
    questions: QuestionSet,
    variants: Sequence[str],
    *,
    control: AdapterStore | None = None,
    strengths: Sequence[float] = (),
    with_naive_bayes: bool = False,
    scorer: str = "exact",
    max_tokens: int = 16,
    margin: float = 0.02,
    seed: int = 0,
    note: Note,
    **tolerances: float,
) -> dict[str, Any]:
    """The body of POST /ablation, computed here, greedily; and what else answers the same questions, as further rows.

    Args:
        control: a store of LoRAs that never saw CRMA, the counterfactual: a LoRA trained with CRMA misses it.
        strengths: of the injection, "task+crma x0.25"; 0 is off and 1 is on.
        with_naive_bayes: a classifier of the task's training split, no language model. Built-in tasks, no likelihoods.
    """
    check_settings(questions.questions, scorer=scorer, margin=margin, **tolerances)
    labels = plan(
        questions.questions, variants, served.selection
    ).job_of  # raises for what is not there

    def of(asked: Served, variant: str, strength: float = 1.0) -> Answerer:
        return lambda task, asks: asked.outcomes(
            task, asked.plan(variant, task, strength), asks, scorer, max_tokens
        )

    def by_naive_bayes(task: str, asks: Sequence[Question]) -> list[ItemResult]:
        answers = naive_bayes(load_split(task, "train"), [question.question for question in asks])
        return [ItemResult("scored", text) for text in answers]

    answerers: dict[str, Answerer] = {variant: of(served, variant) for variant in variants}
    answerers |= {
        f"task+crma x{strength:g}": of(served, "task+crma", strength) for strength in strengths
    }
    if control is not None:
        answerers["control"] = of(served.with_store(control), "task")
    if with_naive_bayes:
        answerers["naive_bayes"] = by_naive_bayes
    tasks = dict.fromkeys(question.task for question in questions.questions)
    rows: dict[str, tuple[ItemResult, ...]] = {}
    for label, answer in answerers.items():
        outcomes: dict[str, ItemResult] = {}
        for task in tasks:
            asked = [question for question in questions.questions if question.task == task]
            note(f"{task}, {label}: {len(asked)} questions")
            outcomes |= zip([question.id for question in asked], answer(task, asked), strict=True)
        rows[label] = tuple(outcomes[question.id] for question in questions.questions)
    rows = {
        label: rows[label.partition("#")[0]] for label in (*labels, *answerers)
    }  # a null run shares its answers
    backbone, known = served.store.backbone(), served.store.task_names()
    provenance: dict[str, Any] = {
        "base": served.base.digest,
        "backbone": backbone.digest if backbone else None,
    }
    provenance["tasks"] = {task: served.store.task(task).digest for task in tasks if task in known}
    provenance |= {"dtype": str(served.dtype).removeprefix("torch."), "seed": seed}
    provenance |= {"hardware": hardware(), "commit": commit()}
    return {
        "question_set": questions.describe(),
        "scorer": scorer,
        **report(questions.questions, rows, scorer=scorer, margin=margin, seed=seed, **tolerances),
        "provenance": provenance,
    }
