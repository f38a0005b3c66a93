"""On/off ablation: which generations to run, and what their outcomes say.

Shared by the server's route and the `crma ablate` command; it runs nothing itself.

    work = plan(questions, ["task+crma", "task"], select)
    outcomes = [run(job) for job in work.jobs]                    # ItemResult each, in any order of execution
    body = report(questions, work.by_variant(outcomes), scorer="exact", margin=0.02, seed=0)

A variant named twice is a null run: the second is labelled "task#2", and the flips between the two say how much of
any other comparison is noise. Variants that resolve to one selection share each item's outcome, so a null run has no
flips by construction; `repeat=True` runs them apart.
"""

from collections import Counter
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


Marked = tuple[ItemResult, bool | None]  # an outcome, and whether it is right: None unless scored


@dataclass(frozen=True)
class Job:
    """One generation: the question's index and the adapters to answer it with."""

    question: int
    selection: AdapterSelection


@dataclass(frozen=True)
class AblationPlan:
    """`jobs` to run, and for every variant's label the job that answers each question."""

    jobs: tuple[Job, ...]
    job_of: Mapping[str, tuple[int, ...]]  # label -> [questions] index into jobs

    def by_variant(self, outcomes: Sequence[ItemResult]) -> dict[str, tuple[ItemResult, ...]]:
        """Outcomes [jobs], in the order of `jobs`, fanned out to label -> [questions]."""
        return {label: tuple(outcomes[job] for job in row) for label, row in self.job_of.items()}


def plan(
    questions: Sequence[Question],
    variants: Sequence[Variant],
    select: Callable[[Variant, str], AdapterSelection],
    *,
    repeat: bool = False,
) -> AblationPlan:
    """The generations that answer every question under every variant, each once; question by question.

    Args:
        questions: in the order of the report.
        variants: in the order of the report; a variant given twice makes a null run.
        select: (variant, task name) -> selection; asked once for each pair, and may raise for adapters it lacks.
        repeat: run variants of equal selection apart, to see what is not deterministic.
    """
    labels = _labels(variants)
    tasks = dict.fromkeys(question.task for question in questions)
    selections = {(variant, task): select(variant, task) for task in tasks for variant in dict.fromkeys(variants)}
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
    return AblationPlan(tuple(jobs), {label: tuple(row) for label, row in rows.items()})


def check_settings(*, scorer: str, margin: float) -> None:
    """ConfigError for a scorer or margin that `report` would refuse; to be called before the generations run."""
    scorer_named(scorer)
    statistics.check_share(margin)


def report(
    questions: Sequence[Question], results: Mapping[str, Sequence[ItemResult]], *, scorer: str, margin: float, seed: int
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
    marked = {label: _marked(questions, row, scorer) for label, row in results.items()}
    return {
        "variants": {label: _summary(questions, row) for label, row in marked.items()},
        "comparisons": [
            {"a": a, "b": b} | _comparison(questions, marked[a], marked[b], margin=margin, seed=seed)
            for a, b in combinations(marked, 2)
        ],
        "items": [
            question.model_dump(mode="json", include={"id", "task", "answers"})
            | {"outputs": {label: _output(*row[i]) for label, row in marked.items()}}
            for i, question in enumerate(questions)
        ],
    }


def _marked(questions: Sequence[Question], row: Sequence[ItemResult], scorer: str) -> list[Marked]:
    is_right = scorer_named(scorer)
    return [
        (result, is_right(result.text or "", question.answers) if result.status == "scored" else None)
        for question, result in zip(questions, row, strict=True)
    ]


def _labels(variants: Sequence[Variant]) -> tuple[str, ...]:
    """A distinct name for each place: "task", then "task#2" for the same variant again."""
    if not variants or not set(variants) <= set(VARIANTS):
        message = "Variants are one or more of those there are."
        raise ConfigError(message, field="variants", value=list(variants), allowed=list(VARIANTS))
    nth = [variants[: i + 1].count(variant) for i, variant in enumerate(variants)]
    return tuple(name if n == 1 else f"{name}#{n}" for name, n in zip(variants, nth, strict=True))


def _summary(questions: Sequence[Question], row: Sequence[Marked]) -> dict[str, Any]:
    """A variant's counts over all items, and the same for each task under "by_task"."""
    by_task: dict[str, list[Marked]] = {}
    for question, item in zip(questions, row, strict=True):
        by_task.setdefault(question.task, []).append(item)
    return _counts(row) | {"by_task": {task: _counts(items) for task, items in by_task.items()}}


def _counts(row: Sequence[Marked]) -> dict[str, Any]:
    statuses = Counter(result.status for result, _ in row)
    correct, scored = sum(mark is True for _, mark in row), statuses["scored"]
    return {
        "correct": correct,
        **{status: statuses[status] for status in get_args(Status)},
        "accuracy": correct / scored if scored else None,
        "wilson": list(statistics.wilson(correct, scored)) if scored else None,
    }


def _comparison(
    questions: Sequence[Question], a: Sequence[Marked], b: Sequence[Marked], *, margin: float, seed: int
) -> dict[str, Any]:
    """a against b, item by item: gained = right only in a, lost = right only in b."""
    pairs = zip(questions, a, b, strict=True)
    both = [(q.id, x, y) for q, (_, x), (_, y) in pairs if x is not None and y is not None]
    table = Counter((x, y) for _, x, y in both)
    gained, lost, n = table[True, False], table[False, True], len(both)
    differences = [x - y for _, x, y in both]
    equivalent = statistics.paired_equivalence(differences, margin=margin, seed=seed) if n > 1 else None
    return {
        "n": n,
        "difference": (gained - lost) / n if n else None,
        "bootstrap": list(statistics.paired_bootstrap(differences, seed=seed)) if n > 1 else None,
        "mcnemar": {"gained": gained, "lost": lost, "p": statistics.mcnemar(gained, lost) if n else None},
        "table": {"both": table[True, True], "a_only": gained, "b_only": lost, "neither": table[False, False]},
        "equivalent_within_margin": equivalent,
        "flips": {"gained": [id for id, x, y in both if x > y], "lost": [id for id, x, y in both if x < y]},
    }


def _output(result: ItemResult, mark: bool | None) -> dict[str, Any]:
    """What a variant answered; an item without a score says why, and its "correct" is null."""
    shown: dict[str, Any] = {"text": result.text, "correct": mark}
    return shown if result.status == "scored" else shown | {"status": result.status, "error": result.error}
