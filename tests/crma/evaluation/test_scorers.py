"""What counts as right, and above all what must not."""

import pytest

from crma.core.errors import ConfigError
from crma.evaluation.scorers import check_answers, contains, exact, normalise, number_in, scorer

SAME = [
    ("Infectious diseases.", "infectious diseases"),
    ("  **the**\n\tLAW ", "the law"),
    ("1,000", "1000"),
]
SAME += [
    ("U.S. Tax court's", "US tax courts"),
    ("check-up", "check up"),
    ("e\u0301te\u0301 in Straße", "été in STRASSE"),  # composed or not
    ("\uff2c\uff21\uff37", "law"),  # full-width letters
]
IN_IT = [
    ("I think it is: law.", "law"),
    ("The answer:\n\nneoplasms, chapter 1\n", "Neoplasms"),
    ("tort/law", "law"),
]
DIFFERENT = [
    ("the lawn", "law"),
    ("outlaw", "law"),
    ("infectious and other diseases", "infectious diseases"),
]
DIFFERENT += [
    ("C++", "C"),
    ("-5", "5"),
    ("12.5", "12"),
    ("1,000", "000"),
    ("os.path", "os"),
    ("", "law"),
]
DIFFERENT += [
    ("été", "ete"),
    ("...", "?!"),
]  # accents tell words apart; punctuation alone is no answer


@pytest.mark.parametrize(("text", "answer"), SAME)
def test_case_punctuation_and_spacing_make_no_other_answer(text: str, answer: str) -> None:
    assert exact(text, [answer])
    assert exact(answer, [text])
    assert contains(text, ["medicine", answer])


@pytest.mark.parametrize(("text", "answer"), IN_IT)
def test_contains_looks_for_the_answers_words_side_by_side_and_exact_for_nothing_else(
    text: str, answer: str
) -> None:
    assert contains(text, [answer])
    assert not exact(text, [answer])


@pytest.mark.parametrize(("text", "answer"), DIFFERENT)
def test_another_answer_or_a_part_of_a_word_is_wrong(text: str, answer: str) -> None:
    assert not exact(text, [answer])
    assert not contains(text, [answer])


def test_symbols_that_tell_numbers_apart_stay() -> None:
    assert normalise("U.S. “check-up”: −2.5%, €1,000!") == "us check up −2.5 €1000"


NUMBERS = [
    ("It is 1,234.5 kg.", 1234.5),
    ("2 + 2 = 4", 4),
    ("(−7)", -7),
    ("-.5", -0.5),
    ("about 2e3!", 2000),
    ("5-3", 3),
]
NUMBERS += [
    ("1", 1),
    ("none", None),
    ("12,5", None),
    ("1.2.3", None),
    ("x12", None),
    ("1e999", None),
    ("10²", None),
    ("½", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_last_number_of_a_text_is_read_and_what_is_none_is_not(
    text: str, number: float | None
) -> None:
    assert number_in(text) == number


NEAR = [
    ("1.01", "1", 0.01, 0.0),
    ("0.99", "1", 0.0, 0.02),
    ("-101", "-100", 0, 0.01),
    ("1000", "1,000", 0, 0),
]
FAR = [
    ("1.02", "1", 0.01, 0.0),
    ("1.03", "1", 0.0, 0.02),
    ("100", "-100", 0, 0.01),
    ("1", "100", 0, 0),
    ("", "0", 9, 9),
]


@pytest.mark.parametrize("is_right", [True, False])
def test_numeric_allows_what_a_tolerance_allows_and_no_more(is_right: bool) -> None:
    for text, answer, tolerance, relative in NEAR if is_right else FAR:
        judged = scorer("numeric", tolerance, relative)(f"It is {text}.", ["77777", answer])
        assert judged is is_right, (text, answer)


MATCHES = [("Chapter IX.", r"(?i)chapter (ix|9)\b"), ("a\nb", "(?m)^b$"), ("née", "n.e$")]
NO_MATCHES = [("Chapter IX.", "chapter"), ("law", "^aw"), ("", "a+")]


def test_regex_finds_the_pattern_and_nothing_else_and_is_linear() -> None:
    assert [scorer("regex")(text, ["zzz", wanted]) for text, wanted in MATCHES] == [True] * len(
        MATCHES
    )
    assert [scorer("regex")(text, ["zzz", wanted]) for text, wanted in NO_MATCHES] == [False] * len(
        NO_MATCHES
    )
    assert not scorer("regex")(
        "a" * 50_000 + "!", ["(a+)+$", "(a|a)*$b"]
    )  # years for an engine that backtracks


WRONG = [
    ("numeric", "three"),
    ("regex", "(a"),
    ("regex", r"(a)\1"),
    ("regex", "((a{100}){100}){100}"),
    ("choice", "a"),
]


@pytest.mark.parametrize(("name", "answer"), WRONG)
def test_an_answer_that_the_scorer_cannot_use_is_refused_by_its_place(
    name: str, answer: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_answers(name, "questions[3]", ["1", answer], [])
    assert caught.value.field == (
        "questions[3].choices" if name == "choice" else "questions[3].answers[1]"
    )


def test_a_scorer_that_there_is_not_and_tolerances_without_meaning_are_refused() -> None:
    for arguments in (("vibes",), ("exact", 0.1), ("regex", 0, 0.1)):
        with pytest.raises(ConfigError):
            scorer(*arguments)
