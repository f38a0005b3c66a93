"""What counts as right, and above all what must not."""

import pytest

from crma.scorers import contains, exact, normalise

SAME = [("Infectious diseases.", "infectious diseases"), ("  **the**\n\tLAW ", "the law"), ("1,000", "1000")]
SAME += [
    ("U.S. Tax court's", "US tax courts"),
    ("check-up", "check up"),
    ("e\u0301te\u0301 in Straße", "été in STRASSE"),  # composed or not
    ("\uff2c\uff21\uff37", "law"),  # full-width letters
]
IN_IT = [("I think it is: law.", "law"), ("The answer:\n\nneoplasms, chapter 1\n", "Neoplasms"), ("tort/law", "law")]
DIFFERENT = [("the lawn", "law"), ("outlaw", "law"), ("infectious and other diseases", "infectious diseases")]
DIFFERENT += [("C++", "C"), ("-5", "5"), ("12.5", "12"), ("1,000", "000"), ("os.path", "os"), ("", "law")]
DIFFERENT += [("été", "ete"), ("...", "?!")]  # accents tell words apart; punctuation alone is no answer


@pytest.mark.parametrize(("text", "answer"), SAME)
def test_case_punctuation_and_spacing_make_no_other_answer(text: str, answer: str) -> None:
    assert exact(text, [answer])
    assert exact(answer, [text])
    assert contains(text, ["medicine", answer])


@pytest.mark.parametrize(("text", "answer"), IN_IT)
def test_contains_looks_for_the_answers_words_side_by_side_and_exact_for_nothing_else(text: str, answer: str) -> None:
    assert contains(text, [answer])
    assert not exact(text, [answer])


@pytest.mark.parametrize(("text", "answer"), DIFFERENT)
def test_another_answer_or_a_part_of_a_word_is_wrong(text: str, answer: str) -> None:
    assert not exact(text, [answer])
    assert not contains(text, [answer])


def test_symbols_that_tell_numbers_apart_stay() -> None:
    assert normalise("U.S. “check-up”: −2.5%, €1,000!") == "us check up −2.5 €1000"
