"""A base model with the adapters of a store, without a server: what `crma ablate` and `crma evaluate` ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from crma.ablation import ItemResult, check_settings, plan, report, variant_selection
from crma.adapter import FoldedPair
from crma.baselines import majority, naive_bayes
from crma.data import load_split
from crma.errors import ConfigError, NotFound
from crma.evaluate import Encoded, greedy_answers, measure
from crma.injection import Injection, Plan
from crma.lora import Lora
from crma.model import load_model, load_tokenizer, resolve_device, resolve_dtype
from crma.prompts import PromptFormat, chat_format
from crma.provenance import commit, hardware
from crma.pull import BaseModel
from crma.question_set import QuestionSet
from crma.scorers import exact
from crma.selection import VARIANTS, AdapterSelection, Variant
from crma.sources import DOMAINS
from crma.statistics import wilson
from crma.store import AdapterStore, TaskEntry

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
        self._loras: dict[str, Lora] = {}

    @cached_property
    def backbone(self) -> list[FoldedPair] | None:
        """The serving backbone, folded; None if none serves."""
        entry = self.store.backbone()
        if entry is None:
            return None
        self.store.check_selection(None, entry, self.base.digest)
        return entry.load(self.injection.shapes).folded(self.device, self.dtype)

    def selection(self, variant: Variant, task: str) -> AdapterSelection:
        """Digests of a variant for a task. Raises StoreError, or ConfigError where the store has no backbone."""
        backbone = self.store.backbone() if "crma" in variant else None
        entry = self.store.task(task) if "task" in variant else None
        self.store.check_selection(entry, backbone, self.base.digest)
        selection = variant_selection(
            variant,
            task_digest=None if entry is None else entry.digest,
            crma_digest=None if backbone is None else backbone.digest,
        )
        if entry is not None and entry.digest not in self._loras:
            self._loras[entry.digest] = entry.load(self.injection.shapes).to(self.device, self.dtype)
        return selection

    def plan(self, selection: AdapterSelection) -> Plan:
        """Every row under one selection, as `selection` gave it."""
        tasks = [] if selection.task_digest is None else [(None, self._loras[selection.task_digest])]
        backbones = [] if selection.crma_digest is None or self.backbone is None else [(None, self.backbone)]
        return Plan(tasks, backbones)

    def prompt_format(self, task: str) -> PromptFormat:
        """What the task was trained with, else the chat template."""
        try:
            recorded = self.store.task(task).prompt_format
        except NotFound:
            recorded = None
        return recorded or chat_format(self.tokenizer)

    def answers(self, task: str, selection: AdapterSelection, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers of one selection."""
        fmt = self.prompt_format(task)
        rows = [Encoded(fmt.encode(self.tokenizer, prompt), []) for prompt in prompts]
        stop_id = fmt.stop_id(self.tokenizer)
        return greedy_answers(
            self.injection, self.plan(selection), self.tokenizer, rows, stop_id, max_tokens=max_tokens
        )


def ablate(
    served: Served,
    questions: QuestionSet,
    variants: Sequence[Variant],
    *,
    scorer: str = "exact",
    max_tokens: int = 16,
    margin: float = 0.02,
    seed: int = 0,
    note: Note,
) -> dict[str, Any]:
    """The body of POST /ablation, computed here, greedily."""
    check_settings(scorer=scorer, margin=margin)
    jobs = plan(questions.questions, variants, served.selection)
    groups: dict[tuple[str, AdapterSelection], list[int]] = {}
    for number, job in enumerate(jobs.jobs):
        groups.setdefault((questions.questions[job.question].task, job.selection), []).append(number)
    outcomes: list[ItemResult | None] = [None] * len(jobs.jobs)
    for (task, selection), numbers in groups.items():
        note(f"{task}, {selection.variant}: {len(numbers)} questions")
        prompts = [questions.questions[jobs.jobs[number].question].question for number in numbers]
        for number, text in zip(numbers, served.answers(task, selection, prompts, max_tokens), strict=True):
            outcomes[number] = ItemResult("scored", text=text)
    rows = jobs.by_variant([outcome for outcome in outcomes if outcome is not None])
    return {
        "question_set": questions.describe(),
        "scorer": scorer,
        **report(questions.questions, rows, scorer=scorer, margin=margin, seed=seed),
        "provenance": {"base": served.base.digest, "dtype": str(served.dtype).removeprefix("torch."), "seed": seed},
    }


def score_tasks(
    served: Served, tasks: Sequence[str], split: str, control: AdapterStore | None, *, note: Note
) -> dict[str, Any]:
    """Loss and accuracy of every task under every variant, beside what needs no language model.

    Args:
        tasks: built-in domains that the store serves.
        split: "validation" or "holdout".
        control: a store whose LoRAs never saw CRMA (the counterfactual): adds the variant "control".

    Returns:
        {"split", "tasks": {task: {variant: Measure.to_dict(), "majority": {...}, "naive_bayes": {...}}}, provenance}
    """
    if split not in ("validation", "holdout"):
        raise ConfigError("not a split to score on", field="split", value=split, allowed="validation, holdout")
    if not tasks:
        raise ConfigError(
            "the store serves no built-in task", field="store", value=str(served.store.root), allowed=DOMAINS
        )
    rows: dict[str, Any] = {}
    for task in tasks:
        examples, train = load_split(task, split), load_split(task, "train")
        row: dict[str, Any] = {}
        for variant in VARIANTS:
            note(f"{task}: {variant}")
            plan_of_variant = served.plan(served.selection(variant, task))
            fmt = served.prompt_format(task)
            row[variant] = measure(served.injection, plan_of_variant, served.tokenizer, fmt, examples).to_dict()
        if control is not None:
            note(f"{task}: control")
            entry = control.task(task)
            control.check_selection(entry, None, served.base.digest)
            lora = entry.load(served.injection.shapes).to(served.device, served.dtype)
            fmt = entry.prompt_format or chat_format(served.tokenizer)
            alone = Plan(tasks=[(None, lora)])
            row["control"] = measure(served.injection, alone, served.tokenizer, fmt, examples).to_dict()
        guesses = {"majority": [majority(train)] * len(examples), "naive_bayes": naive_bayes(train, examples)}
        for name, answers in guesses.items():
            correct = sum(exact(answer, [e.completion]) for answer, e in zip(answers, examples, strict=True))
            interval = list(wilson(correct, len(examples)))
            row[name] = {"accuracy": correct / len(examples), "items": len(examples), "wilson": interval}
        rows[task] = row
    return {
        "split": split,
        "tasks": rows,
        "model": served.base.name,
        "base": served.base.digest,
        "seed": _seed(served.store.task(tasks[0])),
        "adapters": {task: served.store.task(task).digest for task in tasks},
        "dtype": str(served.dtype).removeprefix("torch."),
        "hardware": hardware(),
        "commit": commit(),
    }


def _seed(entry: TaskEntry) -> int | None:
    return entry.manifest.trained_on.seed if entry.manifest.trained_on is not None else None
