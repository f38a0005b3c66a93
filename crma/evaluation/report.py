"""The report of an ablation: counts, paired comparisons and every item.

The measures and controls are those of docs/method.md, section 4. A failed or timed-out item is
reported as such and never counted as wrong.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple, get_args

import numpy as np

from crma.evaluation import statistics
from crma.evaluation.ablation import AblationSettings, ItemResult, Status
from crma.evaluation.question_set import Question, QuestionSet

_MAX_EXPONENT = 700.0  # exp overflows a float64 just above 709


def body(
    question_set: QuestionSet,
    settings: AblationSettings,
    results: Mapping[str, Sequence[ItemResult]],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """Return an ablation's answer: the questions, the report, and the provenance of the answers.

    Args:
        question_set: the questions that were asked.
        settings: as they were planned.
        results: label -> [questions] outcomes, of the variants and of any further rows.
        provenance: digests of everything that answered.
    """
    return {
        "question_set": question_set.describe(),
        "scorer": settings.scorer,
        **report(question_set.questions, results, settings),
        "provenance": provenance,
    }


class _Marked(NamedTuple):
    """An outcome with its mark.

    The mark is right or wrong, nats per token for perplexity, or None for an item without a score.
    """

    result: ItemResult
    mark: bool | float | None


_Measure = Callable[[Sequence[_Marked]], dict[str, Any]]


class _Pair(NamedTuple):
    """The marks of one question under the two variants of a comparison."""

    question: Question
    a: bool | float
    b: bool | float

    @property
    def difference(self) -> float:
        """1 for an item right only under a, -1 only under b; or nats per token."""
        return self.a - self.b


def report(
    questions: Sequence[Question],
    results: Mapping[str, Sequence[ItemResult]],
    settings: AblationSettings,
) -> dict[str, Any]:
    """Return the "variants", "comparisons" and "items" of an ablation's answer.

    It is plain JSON without NaN or infinity; a number that too few items leave undefined is null.
    Accuracies are over the scored items of a variant, comparisons over the n items that were scored
    under both. Every pair of rows is compared, in the order given.

    Args:
        questions: the questions that were asked.
        results: label -> [questions] outcomes. A label is a variant's, or that of a further row
            such as a control.
        settings: the scorer, its tolerances, the margin and the seed.

    Raises:
        ConfigError: as `AblationSettings.check`.
    """
    settings.check(questions)
    marked: dict[str, list[_Marked]] = {}
    for label, row in results.items():
        marks = _marks(questions, row, settings)
        marked[label] = [_Marked(*each) for each in zip(row, marks, strict=True)]
    is_perplexity = settings.scorer == "perplexity"
    counts = _perplexity if is_perplexity else _accuracy
    comparisons = []
    for a, b in combinations(marked, 2):
        pairs = _scored_in_both(questions, marked[a], marked[b])
        comparisons.append({"a": a, "b": b} | _comparison(pairs, settings))
    items = []
    for i, question in enumerate(questions):
        shown = question.model_dump(mode="json", include={"id", "task", "answers"})
        outputs = {label: _output(row[i], is_perplexity) for label, row in marked.items()}
        items.append(shown | {"outputs": outputs})
    return {
        "variants": {label: _summary(questions, row, counts) for label, row in marked.items()},
        "comparisons": comparisons,
        "items": items,
    }


def _marks(
    questions: Sequence[Question], row: Sequence[ItemResult], settings: AblationSettings
) -> list[bool | float | None]:
    """Mark each outcome of a row [questions]."""
    is_right = settings.judge()
    marks: list[bool | float | None] = []
    for question, result in zip(questions, row, strict=True):
        if result.status != "scored":
            marks.append(None)
        elif settings.scorer == "perplexity":
            marks.append(result.likelihoods[0].logprob / result.likelihoods[0].num_tokens)
        else:
            marks.append(is_right(result.text or "", question.answers))
    return marks


def _summary(
    questions: Sequence[Question], row: Sequence[_Marked], measure: _Measure
) -> dict[str, Any]:
    """Return a variant's figures over all items, and those of each task under "by_task"."""
    by_task: dict[str, list[_Marked]] = {}
    for question, item in zip(questions, row, strict=True):
        by_task.setdefault(question.task, []).append(item)
    return measure(row) | {"by_task": {task: measure(items) for task, items in by_task.items()}}


def _counts(row: Sequence[_Marked]) -> dict[str, int]:
    """Return how many items of a row [items >= 1] have each status."""
    statuses = Counter(each.result.status for each in row)
    return {status: statuses[status] for status in get_args(Status)}


def _perplexity(row: Sequence[_Marked]) -> dict[str, Any]:
    """Return the counts and the perplexity of a row [items >= 1]; null if no item was scored.

    Every scored item counts the same, however many tokens its answer has.
    """
    nats = [each.mark for each in row if each.mark is not None]
    mean = float(np.mean(nats)) if nats else None
    return {
        **_counts(row),
        "logprob_per_token": mean,
        "averaged_over": "items",
        "perplexity": None if mean is None else math.exp(min(-mean, _MAX_EXPONENT)),
    }


def _accuracy(row: Sequence[_Marked]) -> dict[str, Any]:
    """Return the counts and the accuracy of a row [items >= 1]."""
    counts = _counts(row)
    correct = sum(each.mark is True for each in row)
    scored = counts["scored"]
    unscored = len(row) - scored
    return {
        "correct": correct,
        **counts,
        "accuracy": correct / scored if scored else None,
        "wilson": list(statistics.wilson(correct, scored)) if scored else None,
        "worst_case": correct / len(row),  # if every unscored item were wrong
        "best_case": (correct + unscored) / len(row),  # if every unscored item were right
    }


def _scored_in_both(
    questions: Sequence[Question], a: Sequence[_Marked], b: Sequence[_Marked]
) -> list[_Pair]:
    """Pair the marks of two rows [questions] for the items that were scored in both."""
    pairs = []
    for question, in_a, in_b in zip(questions, a, b, strict=True):
        if in_a.mark is not None and in_b.mark is not None:
            pairs.append(_Pair(question, in_a.mark, in_b.mark))
    return pairs


def _comparison(pairs: Sequence[_Pair], settings: AblationSettings) -> dict[str, Any]:
    """Compare variant a with variant b over the items [n] scored in both."""
    differences = [pair.difference for pair in pairs]
    mean = float(np.mean(differences)) if pairs else None
    bootstrap = None
    if len(pairs) > 1:
        bootstrap = list(statistics.paired_bootstrap(differences, seed=settings.seed))
    comparison = {"n": len(pairs), "difference": mean, "bootstrap": bootstrap}
    if settings.scorer == "perplexity":
        return comparison | _comparison_of_numbers(differences, settings.margin)
    return comparison | _comparison_of_judgements(pairs, settings)


def _comparison_of_numbers(differences: Sequence[float], margin: float) -> dict[str, Any]:
    """Return the part of a comparison that only nats per token have."""
    if len(differences) < 2:
        return {"detectable_difference": None, "equivalent_within_margin": None}
    p = statistics.tost(differences, margin=margin)
    return {
        "detectable_difference": statistics.detectable_mean(differences),
        "equivalent_within_margin": p <= statistics.ALPHA,
    }


def _comparison_of_judgements(pairs: Sequence[_Pair], settings: AblationSettings) -> dict[str, Any]:
    """Return the part of a comparison that only right-or-wrong items have.

    A gained item is right only under a, a lost one only under b.
    """
    n = len(pairs)
    table = Counter((pair.a, pair.b) for pair in pairs)
    gained = table[True, False]
    lost = table[False, True]
    equivalent = None
    if n > 1:
        differences = [pair.difference for pair in pairs]
        equivalent = statistics.paired_equivalence(
            differences, margin=settings.margin, seed=settings.seed
        )
    return {
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
            "gained": [pair.question.id for pair in pairs if pair.a > pair.b],
            "lost": [pair.question.id for pair in pairs if pair.a < pair.b],
        },
        "by_task": _by_task(pairs),
    }


def _by_task(pairs: Sequence[_Pair]) -> dict[str, Any]:
    """Compare each task by itself; "p_holm" is adjusted for the number of tasks."""
    counted: dict[str, Counter[float]] = {}
    for pair in pairs:
        counted.setdefault(pair.question.task, Counter())[pair.difference] += 1
    p_values = [statistics.mcnemar(flips[1], flips[-1]) for flips in counted.values()]
    adjusted = statistics.holm(p_values)
    rows = {}
    for (task, flips), p, p_holm in zip(counted.items(), p_values, adjusted, strict=True):
        n = flips.total()
        gained = flips[1]
        lost = flips[-1]
        rows[task] = {
            "n": n,
            "difference": (gained - lost) / n,
            "mcnemar": {"gained": gained, "lost": lost, "p": p, "p_holm": p_holm},
        }
    return rows


def _output(item: _Marked, is_perplexity: bool) -> dict[str, Any]:
    """Show a variant's answer; the mark of an item that was not scored is null, and it says why."""
    result = item.result
    if is_perplexity:
        shown: dict[str, Any] = {"text": result.text, "logprob_per_token": item.mark}
    else:
        shown = {"text": result.text, "correct": item.mark}
        if result.likelihoods:
            shown["logprobs"] = [each.logprob for each in result.likelihoods]
    if result.status != "scored":
        shown |= {"status": result.status, "error": result.error}
    return shown
