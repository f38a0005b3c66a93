"""A base model with the adapters of a store, without a server: what `crma ablate` and the gate ask."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

from crma.ablation import ItemResult, check_settings, plan, report
from crma.adapter import FoldedPair
from crma.baselines import naive_bayes
from crma.data import load_split
from crma.entry import BackboneEntry, TaskEntry
from crma.errors import ConfigError, NotFound
from crma.evaluate import Encoded, Evaluator
from crma.injection import Injection, Plan
from crma.lora import Lora
from crma.model import load_model, load_tokenizer, resolve_device, resolve_dtype
from crma.prompts import chat_format
from crma.provenance import commit, hardware
from crma.pull import BaseModel
from crma.question_set import Question, QuestionSet, inline_question_set
from crma.selection import VARIANTS, AdapterSelection, Variant
from crma.store import AdapterStore

Note = Callable[[str], None]


class Served:
    """The model, and the store's serving adapters as they are asked for.

    Args:
        dtype: "auto" is what the server serves in.
    """

    def __init__(self, base: BaseModel, store: AdapterStore, *, device: str = "auto", dtype: str = "auto") -> None:
        self.base = base
        self.store = store
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.injection = Injection(load_model(base, self.device, self.dtype))
        self.tokenizer = load_tokenizer(base)
        self._loaded: dict[str, Any] = {}

    def with_store(self, store: AdapterStore) -> "Served":
        """The same model with other adapters."""
        other = copy(self)
        other.store = store
        return other

    def lora(self, entry: TaskEntry) -> Lora:
        """As it serves; read once."""
        if entry.digest not in self._loaded:
            self._loaded[entry.digest] = entry.load(self.injection.shapes).to(self.device, self.dtype)
        return self._loaded[entry.digest]

    def backbone(self, entry: BackboneEntry) -> list[FoldedPair]:
        """As it serves; read once."""
        if entry.digest not in self._loaded:
            self._loaded[entry.digest] = entry.load(self.injection.shapes).folded(self.device, self.dtype)
        return self._loaded[entry.digest]

    def entries(self, variant: Variant, task: str) -> tuple[TaskEntry | None, BackboneEntry | None]:
        """What serves a variant. Raises StoreError, or ConfigError where it needs a backbone and none serves."""
        entry = self.store.task(task) if "task" in variant else None
        backbone = self.store.backbone() if "crma" in variant else None
        if "crma" in variant and backbone is None:
            without = [other for other in VARIANTS if "crma" not in other]
            message = f"Variant {variant!r} needs a backbone, and none serves."
            raise ConfigError(message, field="variants", value=variant, allowed=without)
        self.store.check_selection(entry, backbone, self.base.digest)
        return entry, backbone

    def selection(self, variant: Variant, task: str) -> AdapterSelection:
        """Digests of a variant for a task. Raises as `entries`."""
        entry, backbone = self.entries(variant, task)
        return AdapterSelection(entry.digest if entry else None, backbone.digest if backbone else None)

    def plan(self, variant: Variant, task: str, strength: float = 1.0) -> Plan:
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
        evaluator = self.evaluator(task)
        rows = [Encoded(evaluator.fmt.encode(self.tokenizer, prompt), []) for prompt in prompts]
        return evaluator.answers(plan, rows, max_tokens=max_tokens)


def split_questions(tasks: Sequence[str], split: str) -> QuestionSet:
    """A split of built-in tasks as a question set. Raises DataError."""
    return inline_question_set(
        [
            {"id": f"{task}-{i:03}", "task": task, "question": example.prompt, "answers": [example.completion]}
            for task in tasks
            for i, example in enumerate(load_split(task, split), start=1)
        ],
        name=split,
    )


@dataclass(frozen=True)
class Controls:
    """What else answers the same questions, beside the variants.

    store: of LoRAs that never saw CRMA, "control": the counterfactual, since a LoRA trained with CRMA misses it.
    strengths: of the injection, "task+crma x0.25"; 0 is off and 1 is on.
    naive_bayes: a classifier trained on the task's training split, without any language model. Built-in tasks only.
    """

    store: AdapterStore | None = None
    strengths: tuple[float, ...] = ()
    naive_bayes: bool = False

    def answerers(self, served: Served, max_tokens: int) -> dict[str, Callable[[str, list[str]], list[str]]]:
        """Label -> what answers a task's prompts."""

        def of(asked: Served, variant: Variant, strength: float = 1.0) -> Callable[[str, list[str]], list[str]]:
            return lambda task, prompts: asked.answers(task, asked.plan(variant, task, strength), prompts, max_tokens)

        found = {f"task+crma x{strength:g}": of(served, "task+crma", strength) for strength in self.strengths}
        if self.store is not None:
            found["control"] = of(served.with_store(self.store), "task")
        if self.naive_bayes:
            found["naive_bayes"] = lambda task, prompts: naive_bayes(load_split(task, "train"), prompts)
        return found


def ablate(
    served: Served,
    questions: QuestionSet,
    variants: Sequence[Variant],
    controls: Controls | None = None,
    *,
    scorer: str = "exact",
    max_tokens: int = 16,
    margin: float = 0.02,
    seed: int = 0,
    note: Note,
) -> dict[str, Any]:
    """The body of POST /ablation, computed here, greedily; with `controls` as further variants."""
    check_settings(scorer=scorer, margin=margin)
    work = plan(questions.questions, variants, served.selection)
    groups: dict[tuple[str, AdapterSelection], list[int]] = defaultdict(list)
    for number, job in enumerate(work.jobs):
        groups[questions.questions[job.question].task, job.selection].append(number)
    outcomes: dict[int, ItemResult] = {}
    for (task, selection), numbers in groups.items():
        note(f"{task}, {selection.variant}: {len(numbers)} questions")
        prompts = [questions.questions[work.jobs[number].question].question for number in numbers]
        texts = served.answers(task, served.plan(selection.variant, task), prompts, max_tokens)
        outcomes |= {number: ItemResult("scored", text=text) for number, text in zip(numbers, texts, strict=True)}
    rows = work.by_variant([outcomes[number] for number in range(len(work.jobs))])
    by_task: dict[str, list[Question]] = defaultdict(list)
    for question in questions.questions:
        by_task[question.task].append(question)
    for label, answer in (controls or Controls()).answerers(served, max_tokens).items():
        found: dict[str, ItemResult] = {}
        for task, asked in by_task.items():
            note(f"{task}, {label}: {len(asked)} questions")
            texts = answer(task, [question.question for question in asked])
            found |= {q.id: ItemResult("scored", text=text) for q, text in zip(asked, texts, strict=True)}
        rows[label] = tuple(found[question.id] for question in questions.questions)
    return {
        "question_set": questions.describe(),
        "scorer": scorer,
        **report(questions.questions, rows, scorer=scorer, margin=margin, seed=seed),
        "provenance": {
            "base": served.base.digest,
            "backbone": backbone.digest if (backbone := served.store.backbone()) else None,
            "tasks": {task: served.store.task(task).digest for task in by_task if task in served.store.task_names()},
            "dtype": str(served.dtype).removeprefix("torch."),
            "seed": seed,
            "hardware": hardware(),
            "commit": commit(),
        },
    }
