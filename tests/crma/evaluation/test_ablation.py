"""crma.evaluation.ablation: the plan runs equal selections once; settings are checked first."""

import math
from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.core.selection import AdapterSelection, Cell, read_cell
from crma.evaluation import scorers
from crma.evaluation.ablation import AblationSettings, ItemResult, of_likelihoods, plan
from crma.evaluation.question_set import Question
from crma.evaluation.report import report
from crma.evaluation.scorers import Likelihood

RIGHT = ItemResult("scored", "yes")
WRONG = ItemResult("scored", "no")
FAILED = ItemResult("failed", error="out of memory")
LATE = ItemResult("timed_out", text="yes", error="deadline of 5 s")


def questions(count: int) -> list[Question]:
    return [
        Question(id=f"q{i}", task="medical", question=f"question {i}?", answers=("yes",))
        for i in range(count)
    ]


def select(variant: str, task: str) -> AdapterSelection:
    task_digest = task if "task" in variant else None
    crma_digest = "crma" if "crma" in variant else None
    return AdapterSelection(task_digest, crma_digest)


def test_choices_are_checked_by_the_scorer_that_judges_the_answers() -> None:
    AblationSettings(choices=("Yes.", "no")).check(questions(2))
    with pytest.raises(
        ConfigError, match=r"questions\[0\]: none of its choices is a right"
    ) as caught:
        AblationSettings(choices=("no", "maybe")).check(questions(2))
    assert (caught.value.field, caught.value.value) == ("choices", ["no", "maybe"])


def test_each_text_is_normalised_once_however_many_pairs_there_are() -> None:
    """25 choices and 34 answers of 9,900 U+FDFA took 58 s."""
    answers = tuple(f"answer {i}" for i in range(300))
    question = Question(id="1", task="medical", question="?", answers=answers)
    scorers.normalise.cache_clear()
    with pytest.raises(ConfigError, match="none of its choices is a right"):
        AblationSettings(choices=tuple(f"choice {i}" for i in range(200))).check([question])
    assert scorers.normalise.cache_info().misses == 500


def test_more_pairs_than_can_be_looked_through_are_refused_before_one_is() -> None:
    choices = tuple(map(str, range(1024)))
    question = Question(id="1", task="medical", question="?", answers=("0",) * 1000)
    AblationSettings(choices=choices).check([question])
    with pytest.raises(ConfigError, match="2048000 pairs") as caught:
        AblationSettings(choices=choices).check([question] * 2)
    assert caught.value.field == "choices"


def test_patterns_that_are_too_large_together_are_refused(monkeypatch: Any) -> None:
    """1,000 patterns of 8 characters took 55 s."""
    monkeypatch.setattr(scorers, "MAX_PATTERN_STEPS", 100)
    settings = AblationSettings(scorer="regex")
    settings.check([Question(id="1", task="medical", question="?", answers=("a{20}",) * 3)])
    with pytest.raises(ConfigError, match="too large together") as caught:
        settings.check([Question(id="1", task="medical", question="?", answers=("a{20}",) * 9)])
    assert caught.value.field == "questions[0]"


@pytest.mark.parametrize(
    "name", ["lora", "", "+crma", "crma+task", "base@v1", "task@", "crma@v1/..", "taskcrma", None]
)
def test_an_unknown_variant_is_refused_and_so_is_an_empty_list(name: str | None) -> None:
    variants = ("task", name) if name is not None else ()
    with pytest.raises(ConfigError) as caught:
        plan(questions(4), AblationSettings(variants), select)
    assert (caught.value.field, caught.value.value) == ("variants", name or "")


def test_a_variant_may_name_versions() -> None:
    cells = {
        "task@v2+crma@v1": Cell(True, "v2", True, "v1"),
        "task@v2": Cell(True, "v2", False, None),
        "crma@v3": Cell(False, None, True, "v3"),
        "task+crma": Cell(True, None, True, None),
        "base": Cell(False, None, False, None),
        "task+crma@v1": Cell(True, None, True, "v1"),
    }
    assert {name: read_cell(name) for name in cells} == cells


def test_a_null_run_shares_results_and_so_has_no_flips() -> None:
    settings = AblationSettings(("task", "task"), seed=7)
    work = plan(questions(6), settings, select)
    assert len(work.jobs) == 6
    results = work.by_variant([RIGHT, WRONG, FAILED, RIGHT, LATE, WRONG])
    (comparison,) = report(questions(6), results, settings)["comparisons"]
    assert (comparison["a"], comparison["b"], comparison["n"]) == ("task", "task#2", 4)
    assert comparison["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0}
    assert comparison["bootstrap"] == [0.0, 0.0]


def test_a_repeated_null_run_runs_each_variant_by_itself() -> None:
    settings = AblationSettings(("task", "task"), seed=7, repeat=True)
    work = plan(questions(2), settings, select)
    assert [(job.question, job.nth) for job in work.jobs] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    results = work.by_variant([RIGHT, WRONG, RIGHT, RIGHT])
    found = report(questions(2), results, settings)
    assert found["comparisons"][0]["flips"] == {"gained": ["q0"], "lost": []}


def test_the_choice_is_the_likeliest_text_and_choice_normalised_divides_by_its_length() -> None:
    texts = ("yes", "a long answer")
    likelihoods = [Likelihood(-3.0, 1), Likelihood(-4.0, 3)]
    assert of_likelihoods("choice", texts, likelihoods).text == "yes"
    assert of_likelihoods("choice_normalised", texts, likelihoods).text == "a long answer"


def test_a_log_probability_that_is_not_finite_is_a_failed_item() -> None:
    likelihoods = [Likelihood(-math.inf, 1), Likelihood(-4.0, 3)]
    assert of_likelihoods("choice", ("yes", "no"), likelihoods).status == "failed"


def test_settings_refuse_questions_that_the_scorer_cannot_judge() -> None:
    with pytest.raises(ConfigError, match=r"questions\[0\] has no choices"):
        AblationSettings(scorer="choice", margin=0.1).check(questions(1))
