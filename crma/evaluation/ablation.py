"""On/off ablation: which generations to run, and what their outcomes say.

Shared by the server's route and the `crma ablate` command; it runs nothing itself.

    work = plan(questions, ["task+crma", "task"], select)
    outcomes = [run(job) for job in work.jobs]                    # ItemResult each, in any order of execution
    body = report(questions, work.by_variant(outcomes), scorer="exact", margin=0.02, seed=0)

A variant named twice is a null run: the second is labelled "task#2", and the flips between the two say how much of
any other comparison is noise. Variants that resolve to one selection share each item's outcome, so a null run has no
flips by construction; `repeat=True` runs them apart.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from crma.core.selection import AdapterSelection, read_cell
from crma.evaluation import scorers, statistics
from crma.evaluation.question_set import Question
from crma.evaluation.scorers import Likelihood

Status = Literal["scored", "failed", "timed_out"]


@dataclass(frozen=True)
class ItemResult:
    """Outcome of one job. "scored" has a text, which may be empty; the others are never right or wrong.

    `likelihoods`: of the texts that the scorer asked for, of which `text` is the chosen one (`of_likelihoods`).
    """

    status: Status
    text: str | None = None
    error: str | None = None
    likelihoods: tuple[Likelihood, ...] = ()


# An outcome, and whether it is right, or nats a token where the scorer is no judgement; None unless scored.
Marked = tuple[ItemResult, bool | float | None]


@dataclass(frozen=True)
class Job:
    """One generation: the question's index and the adapters to answer it with; `nth` to do so, where a run repeats."""

    question: int
    selection: AdapterSelection
    nth: int = 0


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
    variants: Sequence[str],
    select: Callable[[str, str], AdapterSelection],
    *,
    repeat: bool = False,
) -> AblationPlan:
    """The generations that answer every question under every variant, each once; question by question.

    Args:
        questions: in the order of the report.
        variants: in the order of the report (`read_cell`); a variant given twice makes a null run.
        select: (variant, task name) -> selection; asked once for each pair, and may raise for adapters it lacks.
        repeat: run variants of equal selection apart, to see what is not deterministic.
    """
    labels = _labels(variants)
    tasks = dict.fromkeys(question.task for question in questions)
    selections = {
        (variant, task): select(variant, task)
        for task in tasks
        for variant in dict.fromkeys(variants)
    }
    jobs: list[Job] = []
    rows: dict[str, list[int]] = {label: [] for label in labels}
    for index, question in enumerate(questions):
        shared: dict[AdapterSelection, int] = {}
        times: Counter[AdapterSelection] = Counter()
        for label, variant in zip(labels, variants, strict=True):
            selection = selections[variant, question.task]
            if repeat or selection not in shared:
                shared[selection] = len(jobs)
                jobs.append(Job(index, selection, times[selection]))
                times[selection] += 1
            rows[label].append(shared[selection])
    return AblationPlan(tuple(jobs), {label: tuple(row) for label, row in rows.items()})


def check_settings(
    questions: Sequence[Question], *, scorer: str, margin: float, **tolerances: float
) -> None:
    """ConfigError for what `report` would refuse or the scorer cannot judge; to be called before anything runs."""
    scorers.scorer(scorer, **tolerances)
    statistics.check_share(margin)
    for i, question in enumerate(questions):
        scorers.check_answers(scorer, f"questions[{i}]", question.answers, question.choices)


def of_likelihoods(
    scorer: str, texts: Sequence[str], likelihoods: Sequence[Likelihood]
) -> ItemResult:
    """The outcome of a scorer that needs `likelihoods` of `texts` (`scorers.continuations`)."""
    if not all(math.isfinite(each.logprob) for each in likelihoods):
        return ItemResult("failed", error="a log-probability is not finite")
    return ItemResult(
        "scored", scorers.likeliest(scorer, texts, likelihoods), likelihoods=tuple(likelihoods)
    )


def report(
    questions: Sequence[Question],
    results: Mapping[str, Sequence[ItemResult]],
    *,
    scorer: str,
    margin: float,
    seed: int,
    **tolerances: float,
) -> dict[str, Any]:
    """The "variants", "comparisons" and "items" of an ablation's answer; plain JSON, nothing in it is NaN or infinite.

    Accuracies are over scored items, comparisons over the n items scored in both variants; every pair is compared, in
    the order given. What too few items leave undefined is null.

    Args:
        questions: what was asked.
        results: label -> [questions] outcomes; the label is a variant's name, or any other for a further control.
        scorer: a name in SCORERS; `tolerances` are those of numeric.
        margin: two variants are equivalent within it, a share of items (or nats a token) in (0, 1).
        seed: of the bootstrap.
    """
    check_settings(questions, scorer=scorer, margin=margin, **tolerances)
    is_right = scorers.scorer(scorer, **tolerances)

    def mark(result: ItemResult, question: Question) -> bool | float | None:
        if result.status != "scored":
            return None
        if scorer == "perplexity":
            return result.likelihoods[0].logprob / result.likelihoods[0].num_tokens
        return is_right(result.text or "", question.answers)

    marked = {
        label: [
            (result, mark(result, question))
            for question, result in zip(questions, row, strict=True)
        ]
        for label, row in results.items()
    }
    return {
        "variants": {label: _summary(questions, row) for label, row in marked.items()},
        "comparisons": [
            {"a": a, "b": b}
            | _comparison(questions, marked[a], marked[b], margin=margin, seed=seed)
            for a, b in combinations(marked, 2)
        ],
        "items": [
            question.model_dump(mode="json", include={"id", "task", "answers"})
            | {"outputs": {label: _output(*row[i]) for label, row in marked.items()}}
            for i, question in enumerate(questions)
        ],
    }


def _labels(variants: Sequence[str]) -> tuple[str, ...]:
    """A distinct name for each place: "task", then "task#2" for the same variant again."""
    for variant in variants or [""]:
        read_cell(variant)
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
    counts = {status: statuses[status] for status in get_args(Status)}
    nats = [mark for _, mark in row if type(mark) is float]
    if nats:
        mean = float(np.mean(nats))
        return {**counts, "logprob_per_token": mean, "perplexity": math.exp(min(-mean, 700.0))}
    return {
        "correct": correct,
        **counts,
        "accuracy": correct / scored if scored else None,
        "wilson": list(statistics.wilson(correct, scored)) if scored else None,
        "worst_case": correct / len(row),  # were every item without a score wrong, and right
        "best_case": (correct + len(row) - scored) / len(row),
    }


def _comparison(
    questions: Sequence[Question],
    a: Sequence[Marked],
    b: Sequence[Marked],
    *,
    margin: float,
    seed: int,
) -> dict[str, Any]:
    """a against b, item by item: gained = right only in a, lost = right only in b."""
    pairs = zip(questions, a, b, strict=True)
    both = [
        (question, x, y) for question, (_, x), (_, y) in pairs if x is not None and y is not None
    ]
    differences = [x - y for _, x, y in both]
    n, several = len(both), len(both) > 1
    about = {
        "n": n,
        "difference": float(np.mean(differences)) if n else None,
        "bootstrap": list(statistics.paired_bootstrap(differences, seed=seed)) if several else None,
    }
    if any(type(x) is float for _, x, _ in both):
        is_same = (
            statistics.tost(differences, margin=margin) <= statistics.ALPHA if several else None
        )
        least = statistics.detectable_mean(differences) if several else None
        return about | {"detectable_difference": least, "equivalent_within_margin": is_same}
    table = Counter((x, y) for _, x, y in both)
    gained, lost = table[True, False], table[False, True]
    equivalent = (
        statistics.paired_equivalence(differences, margin=margin, seed=seed) if several else None
    )
    return about | {
        "mcnemar": {
            "gained": gained,
            "lost": lost,
            "p": statistics.mcnemar(gained, lost) if n else None,
        },
        "table": {
            "both": table[True, True],
            "a_only": gained,
            "b_only": lost,
            "neither": table[False, False],
        },
        "detectable_difference": statistics.detectable_difference(gained + lost, n) if n else None,
        "equivalent_within_margin": equivalent,
        "flips": {
            "gained": [q.id for q, x, y in both if x > y],
            "lost": [q.id for q, x, y in both if x < y],
        },
        "by_task": _by_task([(question.task, x - y) for question, x, y in both]),
    }


def _by_task(differences: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """(task, difference) of each item -> the same of each task, with p adjusted for the number of tasks."""
    counted: dict[str, Counter[float]] = {}
    for task, difference in differences:
        counted.setdefault(task, Counter())[difference] += 1
    p = [statistics.mcnemar(flips[1], flips[-1]) for flips in counted.values()]
    return {
        task: {
            "n": flips.total(),
            "difference": (flips[1] - flips[-1]) / flips.total(),
            "mcnemar": {"gained": flips[1], "lost": flips[-1], "p": each, "p_holm": adjusted},
        }
        for (task, flips), each, adjusted in zip(
            counted.items(), p, statistics.holm(p), strict=True
        )
    }


def _output(result: ItemResult, mark: bool | float | None) -> dict[str, Any]:
    """What a variant answered; an item without a score says why, and its "correct" is null."""
    if type(mark) is float:
        return {"text": result.text, "logprob_per_token": mark}
    shown: dict[str, Any] = {"text": result.text, "correct": mark}
    if result.likelihoods:
        shown["logprobs"] = [each.logprob for each in result.likelihoods]
    return (
        shown
        if result.status == "scored"
        else shown | {"status": result.status, "error": result.error}
    )
