"""On/off ablation: which generations to run, and what their outcomes say.

Shared by the server's route and the `crma ablate` command; it runs nothing itself.

    work = plan(questions, ["task+crma", "task"], select)
    outcomes = [run(job) for job in work.jobs]                    # ItemResult each, in any order of execution
    body = report(questions, work.by_variant(outcomes), scorer="exact", margin=0.02, seed=0)

A variant named twice is a null run: the second is labelled "task#2", and the flips between the two say how much of
any other comparison is noise. Variants that resolve to one selection share each item's outcome, so a null run has no
flips by construction; `repeat=True` runs them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

from crma import statistics
from crma.errors import ConfigError
from crma.question_set import Question
from crma.scorers import scorer as scorer_named
from crma.selection import VARIANTS, AdapterSelection, Variant

Status = Literal["scored", "failed", "timed_out"]


@dataclass(frozen=True)
class ItemResult:
    """Outcome of one generation. "scored" has a text, which may be empty; the others are never right or wrong."""

    status: Status
    text: str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if self.status not in get_args(Status):
            raise ConfigError("Unknown status.", field="status", value=self.status, allowed=list(get_args(Status)))
        if self.status == "scored" and (self.text is None or self.error is not None):
            raise ConfigError(
                "A scored item has a text and no error.",
                field="text, error",
                value=(self.text, self.error),
                allowed="a text, no error",
            )


@dataclass(frozen=True)
class Job:
    """One generation: the question's index and the adapters to answer it with."""

    question: int
    selection: AdapterSelection


@dataclass(frozen=True)
class Plan:
    """`jobs` to run, and for every variant's label the job that answers each question."""

    jobs: tuple[Job, ...]
    job_of: Mapping[str, tuple[int, ...]]  # label -> [questions] index into jobs

    @property
    def num_item_variants(self) -> int:
        """Items times variants: what limits on the size of an ablation count, shared or not."""
        return sum(len(row) for row in self.job_of.values())

    def by_variant(self, outcomes: Sequence[ItemResult]) -> dict[str, tuple[ItemResult, ...]]:
        """Outcomes [jobs], in the order of `jobs`, fanned out to label -> [questions]."""
        if len(outcomes) != len(self.jobs):
            raise ConfigError(
                "Every job has one outcome.",
                field="outcomes",
                value=len(outcomes),
                allowed=f"{len(self.jobs)} outcomes",
            )
        return {label: tuple(outcomes[job] for job in row) for label, row in self.job_of.items()}


def plan(
    questions: Sequence[Question],
    variants: Sequence[Variant],
    select: Callable[[Variant, str], AdapterSelection],
    *,
    repeat: bool = False,
) -> Plan:
    """The generations that answer every question under every variant, each once; question by question.

    Args:
        questions: in the order of the report.
        variants: in the order of the report; a variant given twice makes a null run.
        select: (variant, task name) -> selection; asked once for each pair, and may raise for adapters it lacks.
        repeat: run variants of equal selection apart, to see what is not deterministic.
    """
    labels = _labels(variants)
    selections = {
        (variant, task): select(variant, task)
        for task in dict.fromkeys(question.task for question in questions)
        for variant in dict.fromkeys(variants)
    }
    jobs: list[Job] = []
    rows: dict[str, list[int]] = {label: [] for label in labels}
    for index, question in enumerate(questions):
        shared: dict[AdapterSelection, int] = {}
        for label, variant in zip(labels, variants, strict=True):
            selection = selections[variant, question.task]
            if repeat or selection not in shared:
                shared[selection] = len(jobs)
                jobs.append(Job(index, selection))
            rows[label].append(shared[selection])
    return Plan(tuple(jobs), {label: tuple(row) for label, row in rows.items()})


def variant_selection(variant: Variant, *, task_digest: str | None, crma_digest: str | None) -> AdapterSelection:
    """The selection of one cell of the 2x2; ConfigError where it needs an adapter that is not there."""
    wanted = {"task": "task" in variant, "crma": "crma" in variant}
    for part, digest in (("task", task_digest), ("crma", crma_digest)):
        if wanted[part] and digest is None:
            raise ConfigError(
                f"Variant {variant!r} needs a {part} adapter, and none is there.",
                field="variants",
                value=variant,
                allowed=[other for other in VARIANTS if part not in other],
            )
    return AdapterSelection(task_digest if wanted["task"] else None, crma_digest if wanted["crma"] else None)


def check_settings(*, scorer: str, margin: float) -> None:
    """ConfigError for a scorer or margin that `report` would refuse; to be called before the generations run."""
    scorer_named(scorer)
    statistics.check_share(margin)


def report(
    questions: Sequence[Question],
    results: Mapping[str, Sequence[ItemResult]],
    *,
    scorer: str,
    margin: float,
    seed: int,
) -> dict[str, Any]:
    """The "variants", "comparisons" and "items" of an ablation's answer; plain JSON, nothing in it is NaN or infinite.

    Accuracies are over scored items, comparisons over the n items scored in both variants; every pair is compared, in
    the order given. What too few items leave undefined is null.

    Args:
        questions: what was asked.
        results: label -> [questions] outcomes; the label is a variant's name, or any other for a further control.
        scorer: a name in SCORERS.
        margin: two variants are equivalent within it, a share of items in (0, 1).
        seed: of the bootstrap.
    """
    check_settings(scorer=scorer, margin=margin)
    is_right = scorer_named(scorer)
    for label, row in results.items():
        if len(row) != len(questions):
            raise ConfigError(
                f"Variant {label!r} must have one result for every question.",
                field="results",
                value=len(row),
                allowed=f"{len(questions)} results",
            )
    marks = {
        label: [
            is_right(result.text, question.answers) if result.status == "scored" and result.text is not None else None
            for question, result in zip(questions, row, strict=True)
        ]
        for label, row in results.items()
    }
    return {
        "variants": {label: _summary(questions, row, marks[label]) for label, row in results.items()},
        "comparisons": [
            {"a": a, "b": b} | _comparison(questions, marks[a], marks[b], margin=margin, seed=seed)
            for a, b in combinations(results, 2)
        ],
        "items": [
            {
                "id": question.id,
                "task": question.task,
                "answers": list(question.answers),
                "outputs": {label: _output(row[i], marks[label][i]) for label, row in results.items()},
            }
            for i, question in enumerate(questions)
        ],
    }


def _labels(variants: Sequence[Variant]) -> tuple[str, ...]:
    """A distinct name for each place: "task", then "task#2" for the same variant again."""
    if not variants:
        raise ConfigError("No variant is named.", field="variants", value=[], allowed=list(VARIANTS))
    labels: list[str] = []
    for i, variant in enumerate(variants):
        if variant not in VARIANTS:
            raise ConfigError("Unknown variant.", field=f"variants[{i}]", value=variant, allowed=list(VARIANTS))
        nth = variants[: i + 1].count(variant)
        labels.append(variant if nth == 1 else f"{variant}#{nth}")
    return tuple(labels)


def _summary(questions: Sequence[Question], row: Sequence[ItemResult], marks: Sequence[bool | None]) -> dict[str, Any]:
    """A variant's counts over all items, and the same for each task under "by_task"."""
    places: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        places.setdefault(question.task, []).append(i)
    by_task = {task: _counts([row[i] for i in at], [marks[i] for i in at]) for task, at in places.items()}
    return _counts(row, marks) | {"by_task": by_task}


def _counts(row: Sequence[ItemResult], marks: Sequence[bool | None]) -> dict[str, Any]:
    statuses = [result.status for result in row]
    correct, scored = marks.count(True), statuses.count("scored")
    return {
        "correct": correct,
        "scored": scored,
        "failed": statuses.count("failed"),
        "timed_out": statuses.count("timed_out"),
        "accuracy": correct / scored if scored else None,
        "wilson": list(statistics.wilson(correct, scored)) if scored else None,
    }


def _comparison(
    questions: Sequence[Question],
    a: Sequence[bool | None],
    b: Sequence[bool | None],
    *,
    margin: float,
    seed: int,
) -> dict[str, Any]:
    """a against b, item by item: gained = right only in a, lost = right only in b."""
    ids: dict[tuple[bool, bool], list[str]] = {(x, y): [] for x in (True, False) for y in (True, False)}
    differences: list[int] = []
    for question, right_a, right_b in zip(questions, a, b, strict=True):
        if right_a is not None and right_b is not None:
            ids[right_a, right_b].append(question.id)
            differences.append(right_a - right_b)
    gained, lost, n = ids[True, False], ids[False, True], len(differences)
    enough = n >= 2
    return {
        "n": n,
        "difference": (len(gained) - len(lost)) / n if n else None,
        "bootstrap": list(statistics.paired_bootstrap(differences, seed=seed)) if enough else None,
        "mcnemar": {
            "gained": len(gained),
            "lost": len(lost),
            "p": statistics.mcnemar(len(gained), len(lost)) if n else None,
        },
        "table": {
            "both": len(ids[True, True]),
            "a_only": len(gained),
            "b_only": len(lost),
            "neither": len(ids[False, False]),
        },
        "equivalent_within_margin": statistics.paired_equivalence(differences, margin=margin, seed=seed)
        if enough
        else None,
        "flips": {"gained": gained, "lost": lost},
    }


def _output(result: ItemResult, mark: bool | None) -> dict[str, Any]:
    """What a variant answered; an item without a score says why, and its "correct" is null."""
    shown: dict[str, Any] = {"text": result.text, "correct": mark}
    return shown if result.status == "scored" else shown | {"status": result.status, "error": result.error}
