"""What counts as right, and above all what must not."""

from __future__ import annotations

import pytest

from crma.errors import ConfigError
from crma.scorers import SCORERS, contains, exact, normalise, scorer

SAME = [
    ("Infectious diseases.", "infectious diseases"),
    ("  the\n\tlaw ", "the law"),
    ("**Law**", "law"),
    ("`os.path`", "os.path"),
    ("U.S. Tax Court", "US Tax Court"),
    ("court's", "courts"),
    ("check-up", "check up"),
    ("1,000", "1000"),
    ("Straße", "STRASSE"),
    ("e\u0301te\u0301", "été"),  # composed or not
    ("\uff2c\uff21\uff37", "law"),  # full-width letters
    ("A. law", "a law"),
]
DIFFERENT = [
    ("law", "lawn"),
    ("infectious", "infectious diseases"),
    ("été", "ete"),  # accents tell words apart
    ("C++", "C"),
    ("-5", "5"),
    ("3.14", "314"),
    (".5", "5"),
    ("os.path", "os path"),
    ("1,2", "12"),
    ("a law", "law"),  # no article is taken away
    ("", "law"),
]


@pytest.mark.parametrize(("text", "answer"), SAME)
def test_exact_accepts_what_differs_in_case_punctuation_and_spacing(text: str, answer: str) -> None:
    assert exact(text, [answer])
    assert exact(answer, [text])


@pytest.mark.parametrize(("text", "answer"), DIFFERENT)
def test_exact_refuses_another_answer(text: str, answer: str) -> None:
    assert not exact(text, [answer])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("I think it is: law.", "law"),
        ("Infectious diseases, chapter 1", "infectious diseases"),
        ("The answer:\n\nneoplasms\n", "Neoplasms"),
        ("tort/law", "law"),
    ],
)
def test_contains_accepts_the_answers_words_side_by_side(text: str, answer: str) -> None:
    assert contains(text, [answer])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("the lawn", "law"),
        ("outlaw", "law"),
        ("infectious and other diseases", "infectious diseases"),
        ("diseases infectious", "infectious diseases"),
        ("1,000", "000"),
        ("12.5", "12"),
        ("-5", "5"),
        ("os.path", "os"),
        ("", "law"),
    ],
)
def test_contains_refuses_parts_of_words_and_other_orders(text: str, answer: str) -> None:
    assert not contains(text, [answer])


@pytest.mark.parametrize("score", [exact, contains])
def test_any_of_the_answers_will_do_and_punctuation_alone_never(score) -> None:
    assert score("law", ["medicine", "law"])
    wrong = (("law", ["medicine", "code"]), ("law", []), ("...", ["?!"]), ("", [""]), ("law", ["--"]))
    assert not any(score(text, answers) for text, answers in wrong)


def test_a_scorer_is_found_by_its_name_or_refused_with_those_there_are() -> None:
    assert {name: scorer(name) for name in SCORERS} == {"exact": exact, "contains": contains}
    with pytest.raises(ConfigError) as caught:
        scorer("fuzzy")
    error = caught.value
    assert (error.field, error.value, error.allowed) == ("scorer", "fuzzy", ["exact", "contains"])


def test_normalised_text_is_what_the_docstring_says() -> None:
    assert normalise("U.S. “check-up”: −2.5%, €1,000!") == "us check up −2.5 €1000"
