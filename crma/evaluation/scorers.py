"""Scorers: judge one text against the accepted answers of its question.

`exact`, `contains`, `numeric` and `regex` judge a generated text. `choice` and `choice_normalised`
judge the likeliest of a question's choices. `perplexity` does not judge: it measures how likely the
first answer is. These last three need the log-probabilities of given texts instead of a generation.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import re2

from crma.core.errors import ConfigError

Scorer = Callable[[str, Sequence[str]], bool]

_NUMBER = re.compile(
    r"(?<![\w.,])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![.,]?\d)",
    re.ASCII,
)
_ROUNDING = 1e-12  # relative error of a comparison in float64: 1.01 is within .01 of 1

_MINUS = re.compile(r"(?<!\w)-(?=\.?\d)")
_MINUS_SIGN = "−"  # U+2212 is a mathematical sign and not punctuation
# Apostrophes, full stops and thousands' commas: "court's" is "courts", "U.S." is "US", and "1,000"
# is "1000". A full stop before a digit is a decimal point and stays.
_DROPPED = re.compile(r"['’]|\.(?!\d)|(?<=\d),(?=\d{3}(?!\d))")
_MAX_PATTERN_BYTES = 1 << 18
MAX_PATTERN_STEPS = 2_000_000
"""Instructions of RE2, of all patterns of a question set together: seconds of work."""
_MANY = 4096  # more than one question has answers and choices: each is read once, not once a pair


@lru_cache(_MANY)
def normalise(text: str) -> str:
    """Return a text as scorers compare it: case folded, without punctuation, single spaces.

    Apostrophes, full stops and thousands' commas vanish ("U.S." is "us"); all other punctuation
    separates words ("check-up" is "check up"). A number keeps its sign and its decimal point:
    "-2.5" is neither "2.5" nor "25". Mathematical and currency signs stay ("C++" is not "C"; but
    "C#" is, since # counts as punctuation). Unicode compatibility forms are unified (NFKC). Accents
    stay: they tell words apart, and an answer set can list both spellings.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    signed = _MINUS.sub(_MINUS_SIGN, folded)
    kept = _DROPPED.sub("", signed)
    separators = {ord(char): " " for char in set(kept) if _separates_words(char)}
    return " ".join(kept.translate(separators).split())


def has_words(text: str) -> bool:
    """Whether anything of a text is left once it is normalised, found out without doing so."""
    return any(_is_word(char) for char in set(text))


def composed_length(text: str) -> int:
    """The most characters that NFKC makes of a text, found out without doing so."""
    return sum(count * _composed_length(char) for char, count in Counter(text).items())


@cache
def _is_word(char: str) -> bool:
    return normalise.__wrapped__(char) != ""


@cache
def _composed_length(char: str) -> int:
    return len(unicodedata.normalize("NFKC", char))


def _separates_words(char: str) -> bool:
    """Whether a character is punctuation, or a stand-alone modifier such as ` or ^."""
    category = unicodedata.category(char)
    return char != "." and (category.startswith("P") or category == "Sk")


def exact(text: str, answers: Sequence[str]) -> bool:
    """Right if the whole text is one of the answers, once normalised.

    An answer that is all punctuation never matches.
    """
    found = normalise(text)
    return found != "" and any(found == normalise(answer) for answer in answers)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Right if the words of an answer occur in the text in a row: "law" is not in "lawn".

    Lenient by nature: "not law" contains "law", and a text that lists every label contains the
    right one.
    """
    found = f" {normalise(text)} "
    return any(f" {wanted} " in found for wanted in map(normalise, answers) if wanted)


@lru_cache(_MANY)
def number_in(text: str) -> float | None:
    """Return the last number in a text, or None.

    "1,234.5", "-.5" and "2e3" are numbers; "12,5", "1.2.3", "x12" and "10²" contain none.
    """
    last = None
    for match in _NUMBER.finditer(text):
        following = text[match.end() : match.end() + 1]
        is_raised_or_fraction = following != "" and unicodedata.category(following) == "No"
        if not is_raised_or_fraction:
            last = match[0]
    if last is None:
        return None
    number = float(last.replace(",", "").replace(_MINUS_SIGN, "-"))
    return number if math.isfinite(number) else None


def numeric(
    text: str, answers: Sequence[str], *, tolerance: float = 0.0, relative_tolerance: float = 0.0
) -> bool:
    """Right if the last number of the text is within the larger tolerance of an answer.

    That is |text - answer| <= max(tolerance, relative_tolerance * |answer|), and 1e-12 * |answer|
    more for rounding. Units are not read.
    """
    found = number_in(text)
    if found is None:
        return False
    for answer in answers:
        wanted = number_in(answer)
        if wanted is None:
            continue
        allowed = max(tolerance, relative_tolerance * abs(wanted)) + _ROUNDING * abs(wanted)
        if abs(found - wanted) <= allowed:
            return True
    return False


def regex(text: str, answers: Sequence[str]) -> bool:
    """Right if the text matches one of the answers, which are RE2 patterns. Takes linear time."""
    return any(pattern(answer).search(text) is not None for answer in answers)


@lru_cache(1024)
def pattern(source: str) -> Any:
    """Compile an RE2 pattern within 256 KiB. Raises re2.error."""
    options = re2.Options()
    options.max_mem = _MAX_PATTERN_BYTES
    options.log_errors = False
    return re2.compile(source, options)


def num_steps(name: str, answers: Sequence[str]) -> int:
    """Instructions of the patterns that a scorer makes of answers, which it can use."""
    return sum(pattern(answer).programsize for answer in answers) if name == "regex" else 0


def among(text: str, answers: Sequence[str]) -> bool:
    """Right if the chosen text is exactly one of the answers."""
    return text in answers


class Likelihood(NamedTuple):
    """Log-probability of a text after a prompt, in nats, summed over its tokens."""

    logprob: float
    num_tokens: int


SCORERS: Mapping[str, Scorer] = {
    "exact": exact,
    "contains": contains,
    "numeric": numeric,
    "regex": regex,
    "choice": among,
    "choice_normalised": among,
    "perplexity": among,
}


def scorer(name: str, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> Scorer:
    """Return the scorer of that name.

    Args:
        name: a key of SCORERS.
        tolerance: absolute tolerance, for numeric only.
        relative_tolerance: relative tolerance, for numeric only.

    Raises:
        ConfigError: the name is unknown, or a scorer other than numeric is given a tolerance.
    """
    if name not in SCORERS:
        message = f"There is no scorer {name!r}."
        raise ConfigError(message, field="scorer", value=name, allowed=list(SCORERS))
    if name == "numeric":
        return partial(numeric, tolerance=tolerance, relative_tolerance=relative_tolerance)
    if tolerance or relative_tolerance:
        message = "Only the numeric scorer has tolerances."
        raise ConfigError(message, field="tolerance", value=tolerance, allowed=0)
    return SCORERS[name]


def check_answers(name: str, place: str, answers: Sequence[str], choices: Sequence[str]) -> None:
    """Check that a scorer can judge a question.

    Args:
        name: the scorer.
        place: where the question is, such as "questions[3]"; the error's field starts with it.
        answers: those of the question.
        choices: those of the question, or none.

    Raises:
        ConfigError: an answer has no number or is not a pattern, or choices are missing.
    """
    for i, answer in enumerate(answers):
        problem = _problem(name, answer)
        if problem is not None:
            field = f"{place}.answers[{i}]"
            allowed = "an answer that the scorer can compare"
            raise ConfigError(f"{field} {problem}.", field=field, value=answer, allowed=allowed)
    if _compares_choices(name) and not choices:
        field = f"{place}.choices"
        raise ConfigError(
            f"{place} has no choices.", field=field, value=[], allowed="2 or more texts"
        )


def _problem(name: str, answer: str) -> str | None:
    """Say why a scorer cannot use an answer; None if it can."""
    if name == "numeric" and number_in(answer) is None:
        return "has no number"
    if name == "regex":
        try:
            pattern(answer)
        except re2.error as error:
            return f"is not an RE2 pattern: {error}"
    return None


def _compares_choices(name: str) -> bool:
    return name in ("choice", "choice_normalised")


def continuations(name: str, answers: Sequence[str], choices: Sequence[str]) -> Sequence[str]:
    """Return the texts whose likelihoods a scorer needs; none if it judges a generation."""
    if _compares_choices(name):
        return choices
    if name == "perplexity":
        return answers[:1]
    return ()


def likeliest(name: str, texts: Sequence[str], likelihoods: Sequence[Likelihood]) -> str:
    """Return the text with the largest log-probability, the first of equals.

    `choice_normalised` divides by the number of characters, as lm-eval's acc_norm does, so that a
    long choice is not less likely for its length.

    Args:
        name: the scorer.
        texts: [n >= 1] what was compared.
        likelihoods: [n] one per text.
    """
    scores = []
    for text, likelihood in zip(texts, likelihoods, strict=True):
        divisor = len(text) if name == "choice_normalised" else 1
        scores.append(likelihood.logprob / divisor)
    return texts[scores.index(max(scores))]
