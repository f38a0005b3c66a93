"""A base model with the adapters of a store, without a server: what `crma ablate` and `crma evaluate` ask."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict
from typing import Any

from crma.ablation import ItemResult, check_settings, plan, report
from crma.adapter import FoldedPair
from crma.baselines import majority, naive_bayes
from crma.data import load_split
from crma.errors import ConfigError, NotFound
from crma.evaluate import Encoded, Evaluator, score
from crma.injection import Injection, Plan, plan_rows
from crma.lora import Lora
from crma.model import load_model, load_tokenizer, resolve_device, resolve_dtype
from crma.prompts import chat_format
from crma.provenance import commit, hardware
from crma.pull import BaseModel
from crma.question_set import QuestionSet
from crma.selection import VARIANTS, AdapterSelection, Variant
from crma.sources import DOMAINS
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
        self._loras: dict[str, Lora] = {}
        self._backbones: dict[str, list[FoldedPair]] = {}

    def selection(self, variant: Variant, task: str) -> AdapterSelection:
        """Digests of a variant for a task; its weights are loaded then.

        Raises StoreError, or ConfigError where the variant needs a backbone and none serves.
        """
        entry = self.store.task(task) if "task" in variant else None
        backbone = self.store.backbone() if "crma" in variant else None
        if "crma" in variant and backbone is None:
            without = [other for other in VARIANTS if "crma" not in other]
            message = f"Variant {variant!r} needs a backbone, and none serves."
            raise ConfigError(message, field="variants", value=variant, allowed=without)
        self.store.check_selection(entry, backbone, self.base.digest)
        if entry is not None and entry.digest not in self._loras:
            self._loras[entry.digest] = entry.load(self.injection.shapes).to(self.device, self.dtype)
        if backbone is not None and backbone.digest not in self._backbones:
            self._backbones[backbone.digest] = backbone.load(self.injection.shapes).folded(self.device, self.dtype)
        return AdapterSelection(entry.digest if entry else None, backbone.digest if backbone else None)

    def plan(self, selection: AdapterSelection) -> Plan:
        """Every row under one selection, as `selection` gave it."""
        return plan_rows([selection], self._loras, self._backbones, self.device)

    def evaluator(self, task: str) -> Evaluator:
        """In the format that the task was trained with, else the chat template."""
        try:
            recorded = self.store.task(task).prompt_format
        except NotFound:
            recorded = None
        return Evaluator(self.injection, self.tokenizer, recorded or chat_format(self.tokenizer))

    def answers(self, task: str, selection: AdapterSelection, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers of one selection."""
        evaluator = self.evaluator(task)
        rows = [Encoded(evaluator.fmt.encode(self.tokenizer, prompt), []) for prompt in prompts]
        return evaluator.answers(self.plan(selection), rows, max_tokens=max_tokens)


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
    work = plan(questions.questions, variants, served.selection)
    groups: dict[tuple[str, AdapterSelection], list[int]] = defaultdict(list)
    for number, job in enumerate(work.jobs):
        groups[questions.questions[job.question].task, job.selection].append(number)
    outcomes: dict[int, ItemResult] = {}
    for (task, selection), numbers in groups.items():
        note(f"{task}, {selection.variant}: {len(numbers)} questions")
        prompts = [questions.questions[work.jobs[number].question].question for number in numbers]
        for number, text in zip(numbers, served.answers(task, selection, prompts, max_tokens), strict=True):
            outcomes[number] = ItemResult("scored", text=text)
    rows = work.by_variant([outcomes[number] for number in range(len(work.jobs))])
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
        {"split", "tasks": {task: {variant: Measure, "majority": {...}, "naive_bayes": {...}}}, provenance}
    """
    if split not in ("validation", "holdout"):
        raise ConfigError("not a split to score on", field="split", value=split, allowed="validation, holdout")
    if not tasks:
        message = "the store serves no built-in task"
        raise ConfigError(message, field="store", value=str(served.store.root), allowed=DOMAINS)
    sources: list[tuple[str, Served, Variant]] = [(variant, served, variant) for variant in VARIANTS]
    if control is not None:
        of_control = copy(served)  # the same model
        of_control.store = control
        sources.append(("control", of_control, "task"))
    rows: dict[str, dict[str, Any]] = {task: {} for task in tasks}
    for task, row in rows.items():
        examples, train = load_split(task, split), load_split(task, "train")
        for label, adapters, variant in sources:
            note(f"{task}: {label}")
            plan_of_task = adapters.plan(adapters.selection(variant, task))
            evaluator = adapters.evaluator(task)
            row[label] = asdict(evaluator.measure(plan_of_task, evaluator.encode(examples)))
        row["majority"] = score([majority(train)] * len(examples), examples)
        row["naive_bayes"] = score(naive_bayes(train, examples), examples)
    trained_on = served.store.task(tasks[0]).manifest.trained_on
    return {
        "split": split,
        "tasks": rows,
        "model": served.base.name,
        "base": served.base.digest,
        "seed": None if trained_on is None else trained_on.seed,
        "adapters": {task: served.store.task(task).digest for task in tasks},
        "dtype": str(served.dtype).removeprefix("torch."),
        "hardware": hardware(),
        "commit": commit(),
    }
