"""The plan shares what is the same; the report counts what was scored and nothing else."""

import json
import math
from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.core.selection import AdapterSelection, Cell, read_cell
from crma.evaluation.ablation import ItemResult, check_settings, of_likelihoods, plan, report
from crma.evaluation.question_set import Question
from crma.evaluation.scorers import Likelihood

RIGHT = ItemResult("scored", "yes")
WRONG = ItemResult("scored", "no")
FAILED = ItemResult("failed", error="out of memory")
LATE = ItemResult(
    "timed_out", text="yes", error="deadline of 5 s"
)  # what had come is kept, and not scored
BOTH_TASKS = ("medical", "legal")


def asked(count: int, tasks: tuple[str, ...] = ("medical",)) -> list[Question]:
    task = [tasks[i % len(tasks)] for i in range(count)]
    return [
        Question(id=f"q{i}", task=task[i], question=f"question {i}?", answers=("yes",))
        for i in range(count)
    ]


def select(variant: str, task: str) -> AdapterSelection:
    return AdapterSelection(
        task if "task" in variant else None, "crma" if "crma" in variant else None
    )


def reported(
    results: dict[str, list[ItemResult]], tasks: tuple[str, ...] = ("medical",)
) -> dict[str, Any]:
    count = len(next(iter(results.values())))
    return report(asked(count, tasks), results, scorer="exact", margin=0.02, seed=7)


# The plan


@pytest.mark.parametrize(
    "name", ["lora", "", "+crma", "crma+task", "base@v1", "task@", "crma@v1/..", "taskcrma", None]
)
def test_variants_that_there_are_not_are_refused(name: str | None) -> None:
    with pytest.raises(ConfigError, match="no variant"):
        plan(asked(4), ["task", name] if name is not None else [], select)


def test_a_variant_may_name_versions() -> None:
    cells = {"task@v2+crma@v1": (True, "v2", True, "v1"), "task@v2": (True, "v2", False, None)}
    cells |= {"crma@v3": (False, None, True, "v3"), "task+crma": (True, None, True, None)}
    cells |= {"base": (False, None, False, None), "task+crma@v1": (True, None, True, "v1")}
    assert {name: read_cell(name) for name in cells} == {
        name: Cell(*cell) for name, cell in cells.items()
    }


def test_a_null_run_shares_results_and_has_no_flips_unless_it_is_repeated() -> None:
    work = plan(asked(6), ["task", "task"], select)
    assert len(work.jobs) == 6
    (comparison,) = reported(work.by_variant([RIGHT, WRONG, FAILED, RIGHT, LATE, WRONG]))[
        "comparisons"
    ]
    assert (comparison["a"], comparison["b"], comparison["n"]) == ("task", "task#2", 4)
    assert comparison["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0}
    assert comparison["bootstrap"] == [0.0, 0.0]
    work = plan(asked(2), ["task", "task"], select, repeat=True)
    assert [(job.question, job.nth) for job in work.jobs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    found = reported(work.by_variant([RIGHT, WRONG, RIGHT, RIGHT]))
    assert found["comparisons"][0]["flips"] == {"gained": ["q0"], "lost": []}


# The report


def test_the_papers_shape_of_result_is_reported_as_the_interface_says() -> None:
    on = [RIGHT] * 70 + [WRONG] + [RIGHT] + [WRONG] * 28
    off = [WRONG] * 69 + [RIGHT] + [RIGHT] + [RIGHT] + [WRONG] * 28
    found = reported({"task+crma": on, "task": off})
    counts = {"correct": 71, "scored": 100, "failed": 0, "timed_out": 0, "accuracy": 0.71}
    counts |= {
        "wilson": pytest.approx([0.61, 0.79], abs=0.005),
        "best_case": 0.71,
        "worst_case": 0.71,
    }
    assert found["variants"]["task+crma"] == counts | {"by_task": {"medical": counts}}
    expected = {
        "a": "task+crma",
        "b": "task",
        "n": 100,
        "difference": 0.68,
        "equivalent_within_margin": False,
    }
    expected["bootstrap"] = pytest.approx([0.58, 0.77], abs=0.02)
    expected["mcnemar"] = {"gained": 69, "lost": 1, "p": pytest.approx(1.2e-19, rel=0.01)}
    expected["table"] = {"both": 2, "a_only": 69, "b_only": 1, "neither": 28}
    expected["detectable_difference"] = pytest.approx(0.2396, abs=1e-4)
    in_task = {
        "n": 100,
        "difference": 0.68,
        "mcnemar": expected["mcnemar"] | {"p_holm": expected["mcnemar"]["p"]},
    }
    expected["by_task"] = {"medical": in_task}
    expected["flips"] = {"gained": [f"q{i}" for i in range(69)], "lost": ["q70"]}
    assert found["comparisons"] == [expected]
    outputs = {
        "task+crma": {"text": "yes", "correct": True},
        "task": {"text": "no", "correct": False},
    }
    assert found["items"][0] == {
        "id": "q0",
        "task": "medical",
        "answers": ["yes"],
        "outputs": outputs,
    }


def test_failed_and_timed_out_items_are_counted_apart_and_never_as_wrong() -> None:
    found = reported({"task": [RIGHT, FAILED, LATE, WRONG], "base": [RIGHT, RIGHT, WRONG, FAILED]})
    counts = found["variants"]["task"]
    names = ("correct", "scored", "failed", "timed_out", "accuracy", "worst_case", "best_case")
    assert [counts[name] for name in names] == [1, 2, 1, 1, 0.5, 0.25, 0.75]
    assert found["comparisons"][0]["n"] == 1  # only q0 was scored in both
    assert found["comparisons"][0]["flips"] == {"gained": [], "lost": []}
    shown = [item["outputs"]["task"] for item in found["items"]]
    assert shown[1] == {"text": None, "correct": None, "status": "failed", "error": "out of memory"}
    assert shown[2] == {
        "text": "yes",
        "correct": None,
        "status": "timed_out",
        "error": "deadline of 5 s",
    }


def test_nothing_scored_leaves_nulls_and_no_claim_but_an_empty_answer_is_wrong() -> None:
    found = reported({"task": [FAILED, FAILED], "base": [ItemResult("scored", ""), WRONG]})
    assert (found["variants"]["task"]["accuracy"], found["variants"]["task"]["wilson"]) == (
        None,
        None,
    )
    assert (found["variants"]["base"]["scored"], found["variants"]["base"]["accuracy"]) == (2, 0.0)
    comparison = found["comparisons"][0]
    undefined = ("difference", "bootstrap", "equivalent_within_margin")
    assert [comparison[key] for key in undefined] == [None, None, None]
    assert (comparison["n"], comparison["mcnemar"]["p"]) == (0, None)
    json.dumps(found, allow_nan=False)


def test_each_task_is_counted_by_itself_and_with_the_scorer_asked_for() -> None:
    row = [ItemResult("scored", "I say yes."), WRONG, RIGHT, FAILED]
    for scorer, medical in (("exact", (1, 2, 0)), ("contains", (2, 2, 0))):
        found = report(asked(4, BOTH_TASKS), {"task": row}, scorer=scorer, margin=0.02, seed=0)
        by_task = found["variants"]["task"]["by_task"]
        counts = {
            task: (row["correct"], row["scored"], row["failed"]) for task, row in by_task.items()
        }
        assert counts == {"medical": medical, "legal": (0, 1, 1)}


def test_each_task_is_compared_by_itself_and_its_p_is_adjusted_for_their_number() -> None:
    on = [RIGHT, RIGHT] * 8
    found = reported({"on": on, "off": [WRONG, WRONG] * 5 + [WRONG, RIGHT] * 3}, BOTH_TASKS)[
        "comparisons"
    ][0]["by_task"]
    rows = {task: (row["n"], row["difference"], row["mcnemar"]) for task, row in found.items()}
    assert rows == {
        "medical": (8, 1.0, {"gained": 8, "lost": 0, "p": 2 / 2**8, "p_holm": 4 / 2**8}),
        "legal": (8, 5 / 8, {"gained": 5, "lost": 0, "p": 2 / 2**5, "p_holm": 2 / 2**5}),
    }


def test_a_choice_is_the_likeliest_and_its_length_counts_if_it_is_to() -> None:
    texts = ("yes", "a long answer")
    likelihoods = [Likelihood(-3.0, 1), Likelihood(-4.0, 3)]
    assert of_likelihoods("choice", texts, likelihoods).text == "yes"
    assert (
        of_likelihoods("choice", texts, [Likelihood(-math.inf, 1), *likelihoods[1:]]).status
        == "failed"
    )
    assert of_likelihoods("choice_normalised", texts, likelihoods).text == "a long answer"
    with pytest.raises(ConfigError, match=r"questions\[0\] has no choices"):
        check_settings(asked(1), scorer="choice", margin=0.1)
    row = [of_likelihoods("choice", texts, likelihoods)]
    question = Question(id="q0", task="medical", question="?", answers=("yes",), choices=texts)
    found = report([question], {"task": row}, scorer="choice", margin=0.1, seed=0)
    assert found["items"][0]["outputs"]["task"] == {
        "text": "yes",
        "correct": True,
        "logprobs": [-3.0, -4.0],
    }


def test_perplexity_is_a_number_and_compared_as_one() -> None:
    def row(*nats: float) -> list[ItemResult]:
        return [of_likelihoods("perplexity", ["yes"], [Likelihood(4 * each, 4)]) for each in nats]

    results = {"on": [*row(-1.0, -0.5, -0.75), FAILED], "off": row(-2.0, -1.5, -1.5, -9.0)}
    found = report(asked(4), results, scorer="perplexity", margin=0.02, seed=7)
    counts = {
        "scored": 3,
        "failed": 1,
        "timed_out": 0,
        "logprob_per_token": -0.75,
        "perplexity": pytest.approx(2.117),
    }
    assert found["variants"]["on"] == counts | {"by_task": {"medical": counts}}
    comparison = found["comparisons"][0]
    assert list(comparison) == [
        "a",
        "b",
        "n",
        "difference",
        "bootstrap",
        "detectable_difference",
        "equivalent_within_margin",
    ]
    assert (comparison["n"], comparison["difference"]) == (3, pytest.approx(2.75 / 3))
    assert comparison["bootstrap"] == pytest.approx([0.75, 1.0])
    assert found["items"][0]["outputs"]["off"] == {"text": "yes", "logprob_per_token": -2.0}
