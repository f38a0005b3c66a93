"""crma.evaluation.report: it counts and compares scored items only, and shows every item."""

import json
from typing import Any

import pytest

from crma.evaluation.ablation import AblationSettings, ItemResult, of_likelihoods
from crma.evaluation.question_set import Question
from crma.evaluation.report import report
from crma.evaluation.scorers import Likelihood

RIGHT = ItemResult("scored", "yes")
WRONG = ItemResult("scored", "no")
FAILED = ItemResult("failed", error="out of memory")
# The text that arrived before the deadline is kept and not scored.
LATE = ItemResult("timed_out", text="yes", error="deadline of 5 s")
BOTH_TASKS = ("medical", "legal")


def questions(count: int, tasks: tuple[str, ...] = ("medical",)) -> list[Question]:
    return [
        Question(
            id=f"q{i}", task=tasks[i % len(tasks)], question=f"question {i}?", answers=("yes",)
        )
        for i in range(count)
    ]


def reported(
    results: dict[str, list[ItemResult]], tasks: tuple[str, ...] = ("medical",)
) -> dict[str, Any]:
    count = len(next(iter(results.values())))
    return report(questions(count, tasks), results, AblationSettings(seed=7))


def test_a_result_of_the_papers_shape_is_reported_in_full() -> None:
    on = [RIGHT] * 70 + [WRONG] + [RIGHT] + [WRONG] * 28
    off = [WRONG] * 69 + [RIGHT] + [RIGHT] + [RIGHT] + [WRONG] * 28
    found = reported({"task+crma": on, "task": off})
    counts = {
        "correct": 71,
        "scored": 100,
        "failed": 0,
        "timed_out": 0,
        "accuracy": 0.71,
        "wilson": pytest.approx([0.61, 0.79], abs=0.005),
        "best_case": 0.71,
        "worst_case": 0.71,
    }
    assert found["variants"]["task+crma"] == counts | {"by_task": {"medical": counts}}
    p = pytest.approx(1.2e-19, rel=0.01)
    comparison = {
        "a": "task+crma",
        "b": "task",
        "n": 100,
        "difference": 0.68,
        "bootstrap": pytest.approx([0.58, 0.77], abs=0.02),
        "mcnemar": {"gained": 69, "lost": 1, "p": p},
        "table": {"both": 2, "a_only": 69, "b_only": 1, "neither": 28},
        "detectable_difference": pytest.approx(0.2396, abs=1e-4),
        "equivalent_within_margin": False,
        "flips": {"gained": [f"q{i}" for i in range(69)], "lost": ["q70"]},
        "by_task": {
            "medical": {
                "n": 100,
                "difference": 0.68,
                "mcnemar": {"gained": 69, "lost": 1, "p": p, "p_holm": p},
            }
        },
    }
    assert found["comparisons"] == [comparison]
    assert found["items"][0] == {
        "id": "q0",
        "task": "medical",
        "answers": ["yes"],
        "outputs": {
            "task+crma": {"text": "yes", "correct": True},
            "task": {"text": "no", "correct": False},
        },
    }


def test_failed_and_timed_out_items_are_counted_separately_and_never_as_wrong() -> None:
    found = reported({"task": [RIGHT, FAILED, LATE, WRONG], "base": [RIGHT, RIGHT, WRONG, FAILED]})
    counts = found["variants"]["task"]
    names = ("correct", "scored", "failed", "timed_out", "accuracy", "worst_case", "best_case")
    assert [counts[name] for name in names] == [1, 2, 1, 1, 0.5, 0.25, 0.75]
    assert found["comparisons"][0]["n"] == 1  # only q0 was scored in both
    assert found["comparisons"][0]["flips"] == {"gained": [], "lost": []}
    outputs = [item["outputs"]["task"] for item in found["items"]]
    failed = {"text": None, "correct": None, "status": "failed", "error": "out of memory"}
    late = {"text": "yes", "correct": None, "status": "timed_out", "error": "deadline of 5 s"}
    assert outputs[1:3] == [failed, late]


def test_a_variant_without_scored_items_has_nulls_and_claims_nothing() -> None:
    found = reported({"task": [FAILED, FAILED], "base": [ItemResult("scored", ""), WRONG]})
    task = found["variants"]["task"]
    assert (task["accuracy"], task["wilson"]) == (None, None)
    comparison = found["comparisons"][0]
    undefined = ("difference", "bootstrap", "equivalent_within_margin")
    assert [comparison[key] for key in undefined] == [None, None, None]
    assert (comparison["n"], comparison["mcnemar"]["p"]) == (0, None)
    json.dumps(found, allow_nan=False)


def test_an_empty_answer_is_scored_and_wrong() -> None:
    base = reported({"base": [ItemResult("scored", ""), WRONG]})["variants"]["base"]
    assert (base["scored"], base["accuracy"]) == (2, 0.0)


@pytest.mark.parametrize(("scorer", "medical"), [("exact", (1, 2, 0)), ("contains", (2, 2, 0))])
def test_each_task_is_counted_by_itself_with_the_scorer_of_the_settings(
    scorer: str, medical: tuple[int, int, int]
) -> None:
    row = [ItemResult("scored", "I say yes."), WRONG, RIGHT, FAILED]
    settings = AblationSettings(scorer=scorer)
    found = report(questions(4, BOTH_TASKS), {"task": row}, settings)
    by_task = found["variants"]["task"]["by_task"]
    names = ("correct", "scored", "failed")
    counts = {task: tuple(map(row.get, names)) for task, row in by_task.items()}
    assert counts == {"medical": medical, "legal": (0, 1, 1)}


def test_each_task_is_compared_by_itself_and_its_p_is_adjusted_for_the_number_of_tasks() -> None:
    on = [RIGHT, RIGHT] * 8
    off = [WRONG, WRONG] * 5 + [WRONG, RIGHT] * 3
    by_task = reported({"on": on, "off": off}, BOTH_TASKS)["comparisons"][0]["by_task"]
    assert by_task == {
        "medical": {
            "n": 8,
            "difference": 1.0,
            "mcnemar": {"gained": 8, "lost": 0, "p": 2 / 2**8, "p_holm": 4 / 2**8},
        },
        "legal": {
            "n": 8,
            "difference": 5 / 8,
            "mcnemar": {"gained": 5, "lost": 0, "p": 2 / 2**5, "p_holm": 2 / 2**5},
        },
    }


def test_a_choice_is_shown_with_the_log_probabilities_of_all_choices() -> None:
    texts = ("yes", "a long answer")
    row = [of_likelihoods("choice", texts, [Likelihood(-3.0, 1), Likelihood(-4.0, 3)])]
    question = Question(id="q0", task="medical", question="?", answers=("yes",), choices=texts)
    settings = AblationSettings(scorer="choice", margin=0.1)
    (item,) = report([question], {"task": row}, settings)["items"]
    shown = {"text": "yes", "correct": True, "logprobs": [-3.0, -4.0]}
    assert item["outputs"]["task"] == shown


def test_perplexity_is_a_number_and_is_compared_as_one() -> None:
    def row(*nats: float) -> list[ItemResult]:
        return [of_likelihoods("perplexity", ["yes"], [Likelihood(4 * each, 4)]) for each in nats]

    results = {"on": [*row(-1.0, -0.5, -0.75), FAILED], "off": row(-2.0, -1.5, -1.5, -9.0)}
    found = report(questions(4), results, AblationSettings(scorer="perplexity", seed=7))
    counts = {
        "scored": 3,
        "failed": 1,
        "timed_out": 0,
        "logprob_per_token": -0.75,
        "averaged_over": "items",
        "perplexity": pytest.approx(2.117),
    }
    assert found["variants"]["on"] == counts | {"by_task": {"medical": counts}}
    comparison = found["comparisons"][0]
    about_any = ["a", "b", "n", "difference", "bootstrap"]
    assert list(comparison) == [*about_any, "detectable_difference", "equivalent_within_margin"]
    assert (comparison["n"], comparison["difference"]) == (3, pytest.approx(2.75 / 3))
    assert comparison["bootstrap"] == pytest.approx([0.75, 1.0])
    shown = {"text": "yes", "logprob_per_token": -2.0}
    assert found["items"][0]["outputs"]["off"] == shown


def test_a_perplexity_that_no_item_was_scored_for_is_null_and_is_no_accuracy() -> None:
    settings = AblationSettings(scorer="perplexity")
    found = report(questions(2), {"on": [FAILED] * 2, "off": [FAILED] * 2}, settings)
    counts = {"scored": 0, "failed": 2, "timed_out": 0}
    unknown = {"logprob_per_token": None, "averaged_over": "items", "perplexity": None}
    measured = counts | unknown
    assert found["variants"]["on"] == measured | {"by_task": {"medical": measured}}
    comparison = found["comparisons"][0]
    about_any = ["a", "b", "n", "difference", "bootstrap"]
    assert list(comparison) == [*about_any, "detectable_difference", "equivalent_within_margin"]
    shown = found["items"][0]["outputs"]["on"]
    assert "correct" not in shown
    assert (shown["logprob_per_token"], shown["status"]) == (None, "failed")


def test_a_perplexity_is_averaged_over_items_however_long_their_answers_are() -> None:
    row = [
        of_likelihoods("perplexity", ["yes"], [Likelihood(-1.0, 1)]),
        of_likelihoods("perplexity", ["yes"], [Likelihood(-27.0, 9)]),
    ]
    found = report(questions(2), {"on": row}, AblationSettings(scorer="perplexity"))
    assert found["variants"]["on"]["logprob_per_token"] == pytest.approx(-2.0)
