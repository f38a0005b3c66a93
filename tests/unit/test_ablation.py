"""The plan shares what is the same; the report counts what was scored and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crma.ablation import ItemResult, Plan, check_settings, plan, report, variant_selection
from crma.errors import ConfigError
from crma.question_set import Question
from crma.selection import BASE, VARIANTS, AdapterSelection, Variant

RIGHT = ItemResult("scored", "yes")
WRONG = ItemResult("scored", "no")
FAILED = ItemResult("failed", error="out of memory")
LATE = ItemResult("timed_out", error="deadline of 5 s")


def asked(count: int, tasks: tuple[str, ...] = ("medical",)) -> list[Question]:
    return [Question(f"q{i}", tasks[i % len(tasks)], f"question {i}?", ("yes",)) for i in range(count)]


def select(variant: Variant, task: str) -> AdapterSelection:
    return variant_selection(variant, task_digest=f"sha256:{task}", crma_digest="sha256:crma")


def reported(results: dict[str, list[ItemResult]], *, tasks: tuple[str, ...] = ("medical",)) -> dict[str, Any]:
    count = len(next(iter(results.values())))
    return report(asked(count, tasks), results, scorer="exact", margin=0.02, seed=7)


# The plan


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("base", BASE),
        ("task", AdapterSelection("t", None)),
        ("crma", AdapterSelection(None, "c")),
        ("task+crma", AdapterSelection("t", "c")),
    ],
)
def test_a_variant_uses_the_adapters_in_its_name(variant: Variant, expected: AdapterSelection) -> None:
    assert variant_selection(variant, task_digest="t", crma_digest="c") == expected
    assert expected.variant == variant


@pytest.mark.parametrize(
    ("variant", "digests", "allowed"),
    [
        ("task+crma", {"task_digest": "t", "crma_digest": None}, ["base", "task"]),
        ("task", {"task_digest": None, "crma_digest": "c"}, ["base", "crma"]),
    ],
)
def test_a_variant_without_its_adapter_is_refused_not_weakened(
    variant: Variant, digests: dict[str, str | None], allowed: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        variant_selection(variant, **digests)
    assert (caught.value.value, caught.value.allowed) == (variant, allowed)


def test_every_item_is_run_once_under_every_variant() -> None:
    questions = asked(3, ("medical", "legal"))
    work = plan(questions, VARIANTS, select)
    assert [(job.question, job.selection) for job in work.jobs] == [
        (i, select(variant, question.task)) for i, question in enumerate(questions) for variant in VARIANTS
    ]
    assert work.num_item_variants == 12


def test_outcomes_fan_out_to_the_variants_and_questions_they_answer() -> None:
    questions = asked(4, ("medical", "legal"))
    work = plan(questions, ["task", "base", "task"], select)
    outcomes = [ItemResult("scored", f"{job.question} {job.selection}") for job in work.jobs]
    rows = work.by_variant(outcomes)
    assert list(rows) == ["task", "base", "task#2"]
    for label, variant in (("task", "task"), ("base", "base"), ("task#2", "task")):
        expected = [f"{i} {select(variant, question.task)}" for i, question in enumerate(questions)]
        assert [result.text for result in rows[label]] == expected


def test_a_null_run_shares_results_and_has_no_flips() -> None:
    questions = asked(6)
    work = plan(questions, ["task", "task"], select)
    assert len(work.jobs) == 6
    assert work.num_item_variants == 12
    noisy = [RIGHT, WRONG, FAILED, RIGHT, LATE, WRONG]
    found = report(questions, work.by_variant(noisy), scorer="exact", margin=0.02, seed=7)
    comparison = found["comparisons"][0]
    assert (comparison["a"], comparison["b"], comparison["n"]) == ("task", "task#2", 4)
    assert comparison["flips"] == {"gained": [], "lost": []}
    assert comparison["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0}
    assert comparison["bootstrap"] == [0.0, 0.0]


def test_variants_that_resolve_to_one_selection_are_shared_per_task() -> None:
    def imported(variant: Variant, task: str) -> AdapterSelection:  # "legal" never saw CRMA: both variants are the same
        return select("task" if task == "legal" else variant, task)

    work = plan(asked(4, ("medical", "legal")), ["task+crma", "task"], imported)
    assert [job.question for job in work.jobs] == [0, 0, 1, 2, 2, 3]


def test_repeat_runs_equal_variants_apart() -> None:
    questions = asked(2)
    work = plan(questions, ["task", "task"], select, repeat=True)
    assert [job.question for job in work.jobs] == [0, 0, 1, 1]
    found = report(questions, work.by_variant([RIGHT, WRONG, RIGHT, RIGHT]), scorer="exact", margin=0.02, seed=7)
    assert found["comparisons"][0]["flips"] == {"gained": ["q0"], "lost": []}


def test_adapters_are_looked_up_once_a_task_and_variant() -> None:
    calls: list[tuple[str, str]] = []

    def counted(variant: Variant, task: str) -> AdapterSelection:
        calls.append((variant, task))
        return select(variant, task)

    plan(asked(10, ("medical", "legal")), ["task", "base", "task"], counted)
    assert sorted(calls) == [("base", "legal"), ("base", "medical"), ("task", "legal"), ("task", "medical")]


@pytest.mark.parametrize(("variants", "field"), [([], "variants"), (["task", "off"], "variants[1]")])
def test_no_or_unknown_variants_are_refused(variants: list[Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(asked(1), variants, select)
    assert (caught.value.field, caught.value.allowed) == (field, list(VARIANTS))


def test_outcomes_that_do_not_fit_the_plan_are_refused() -> None:
    work: Plan = plan(asked(2), ["task", "base"], select)
    with pytest.raises(ConfigError, match="one outcome"):
        work.by_variant([RIGHT] * 3)


# The report


def test_the_papers_shape_of_result_is_reported_as_the_interface_says() -> None:
    on = [RIGHT] * 70 + [WRONG] + [RIGHT] + [WRONG] * 28
    off = [WRONG] * 69 + [RIGHT] + [RIGHT] + [RIGHT] + [WRONG] * 28
    found = reported({"task+crma": on, "task": off})
    whole = found["variants"]["task+crma"]
    assert {key: whole[key] for key in ("correct", "scored", "failed", "timed_out", "accuracy")} == {
        "correct": 71,
        "scored": 100,
        "failed": 0,
        "timed_out": 0,
        "accuracy": 0.71,
    }
    assert whole["wilson"] == pytest.approx([0.61, 0.79], abs=0.005)
    (comparison,) = found["comparisons"]
    assert (comparison["a"], comparison["b"], comparison["n"]) == ("task+crma", "task", 100)
    assert comparison["difference"] == 0.68
    assert comparison["bootstrap"] == pytest.approx([0.58, 0.77], abs=0.02)
    assert comparison["mcnemar"] == {"gained": 69, "lost": 1, "p": pytest.approx(1.2e-19, rel=0.01)}
    assert comparison["table"] == {"both": 2, "a_only": 69, "b_only": 1, "neither": 28}
    assert comparison["equivalent_within_margin"] is False
    assert comparison["flips"] == {"gained": [f"q{i}" for i in range(69)], "lost": ["q70"]}
    assert found["items"][0] == {
        "id": "q0",
        "task": "medical",
        "answers": ["yes"],
        "outputs": {"task+crma": {"text": "yes", "correct": True}, "task": {"text": "no", "correct": False}},
    }


def test_failed_and_timed_out_items_are_counted_apart_and_never_as_wrong() -> None:
    found = reported({"task": [RIGHT, FAILED, LATE, WRONG], "base": [RIGHT, RIGHT, WRONG, FAILED]})
    counts = found["variants"]["task"]
    assert (counts["correct"], counts["scored"], counts["failed"], counts["timed_out"]) == (1, 2, 1, 1)
    assert counts["accuracy"] == 0.5
    assert found["comparisons"][0]["n"] == 1  # only q0 was scored in both
    assert found["comparisons"][0]["flips"] == {"gained": [], "lost": []}
    assert found["items"][1]["outputs"]["task"] == {
        "text": None,
        "correct": None,
        "status": "failed",
        "error": "out of memory",
    }
    assert found["items"][2]["outputs"]["task"]["status"] == "timed_out"


def test_a_text_that_came_with_a_failure_is_kept_and_not_scored() -> None:
    partial = ItemResult("timed_out", text="yes", error="deadline")
    found = reported({"task": [partial]})
    assert found["variants"]["task"]["correct"] == 0
    assert found["variants"]["task"]["scored"] == 0
    assert found["items"][0]["outputs"]["task"]["text"] == "yes"
    assert found["items"][0]["outputs"]["task"]["correct"] is None


def test_an_empty_answer_is_wrong_not_failed() -> None:
    found = reported({"task": [ItemResult("scored", "")]})
    assert (found["variants"]["task"]["scored"], found["variants"]["task"]["accuracy"]) == (1, 0.0)


def test_nothing_scored_leaves_nulls_and_no_claim() -> None:
    found = reported({"task": [FAILED, FAILED], "base": [RIGHT, WRONG]})
    assert found["variants"]["task"]["accuracy"] is None
    assert found["variants"]["task"]["wilson"] is None
    comparison = found["comparisons"][0]
    undefined = ("difference", "bootstrap", "equivalent_within_margin")
    assert [comparison[key] for key in undefined] == [None, None, None]
    assert (comparison["n"], comparison["mcnemar"]["p"]) == (0, None)


def test_too_few_items_never_show_equivalence() -> None:
    assert reported({"task": [RIGHT] * 9, "base": [RIGHT] * 9})["comparisons"][0]["equivalent_within_margin"] is None
    assert (
        reported({"task": [RIGHT] * 200, "base": [RIGHT] * 200})["comparisons"][0]["equivalent_within_margin"] is True
    )


def test_every_pair_is_compared_in_the_order_given() -> None:
    found = reported({label: [RIGHT, WRONG] for label in ("task+crma", "task", "base", "frozen-matched")})
    assert [(c["a"], c["b"]) for c in found["comparisons"]] == [
        ("task+crma", "task"),
        ("task+crma", "base"),
        ("task+crma", "frozen-matched"),
        ("task", "base"),
        ("task", "frozen-matched"),
        ("base", "frozen-matched"),
    ]


def test_one_variant_has_no_comparison() -> None:
    assert reported({"task": [RIGHT]})["comparisons"] == []


def test_each_task_is_counted_by_itself() -> None:
    found = reported({"task": [RIGHT, WRONG, RIGHT, FAILED]}, tasks=("medical", "legal"))
    by_task = found["variants"]["task"]["by_task"]
    assert list(by_task) == ["medical", "legal"]
    assert (by_task["medical"]["correct"], by_task["medical"]["scored"]) == (2, 2)
    assert (by_task["legal"]["correct"], by_task["legal"]["scored"], by_task["legal"]["failed"]) == (0, 1, 1)


def test_the_scorer_asked_for_is_the_one_used() -> None:
    wordy = {"task": [ItemResult("scored", "I say yes.")]}
    for scorer, correct in (("exact", 0), ("contains", 1)):
        found = report(asked(1), wordy, scorer=scorer, margin=0.02, seed=0)
        assert found["variants"]["task"]["correct"] == correct


OUTCOME = st.sampled_from([RIGHT, RIGHT, WRONG, WRONG, FAILED, LATE])


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.lists(st.tuples(OUTCOME, OUTCOME, OUTCOME), min_size=1, max_size=25))
def test_reports_add_up(rows: list[tuple[ItemResult, ...]]) -> None:
    results = {label: list(column) for label, column in zip(("a", "b", "c"), zip(*rows, strict=True), strict=True)}
    found = reported(results, tasks=("medical", "legal"))
    json.dumps(found, allow_nan=False)
    assert found == reported(results, tasks=("medical", "legal"))  # the seed decides, nothing else
    for counts in found["variants"].values():
        assert counts["scored"] + counts["failed"] + counts["timed_out"] == len(rows)
        for key in ("correct", "scored", "failed", "timed_out"):
            assert counts[key] == sum(part[key] for part in counts["by_task"].values())
        if counts["scored"]:
            low, high = counts["wilson"]
            assert 0 <= low <= counts["accuracy"] <= high <= 1
    for comparison in found["comparisons"]:
        a, b = comparison["a"], comparison["b"]
        common = [
            item["outputs"]
            for item in found["items"]
            if item["outputs"][a]["correct"] is not None and item["outputs"][b]["correct"] is not None
        ]
        surplus = sum(out[a]["correct"] for out in common) - sum(out[b]["correct"] for out in common)
        test = comparison["mcnemar"]
        assert test["gained"] - test["lost"] == surplus
        assert comparison["n"] == len(common) == sum(comparison["table"].values())
        assert {key: len(ids) for key, ids in comparison["flips"].items()} == {k: test[k] for k in ("gained", "lost")}
        if len(common) >= 2:
            low, high = comparison["bootstrap"]
            assert -1 <= low <= comparison["difference"] <= high <= 1


# Refusals


@pytest.mark.parametrize(
    ("settings_given", "field"),
    [({"scorer": "fuzzy", "margin": 0.02}, "scorer"), ({"scorer": "exact", "margin": float("nan")}, "margin")],
)
def test_settings_can_be_refused_before_anything_runs(settings_given: dict[str, Any], field: str) -> None:
    for refuse in (check_settings, lambda **kw: report(asked(1), {"task": [RIGHT]}, seed=0, **kw)):
        with pytest.raises(ConfigError) as caught:
            refuse(**settings_given)
        assert caught.value.field == field


def test_a_variant_with_a_missing_result_is_refused() -> None:
    with pytest.raises(ConfigError, match="'base'"):
        report(asked(2), {"task": [RIGHT, WRONG], "base": [RIGHT]}, scorer="exact", margin=0.02, seed=0)


@pytest.mark.parametrize(
    "fields",
    [{"status": "scored"}, {"status": "scored", "text": "yes", "error": "but"}, {"status": "wrong", "text": "no"}],
)
def test_a_result_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ItemResult(**fields)
