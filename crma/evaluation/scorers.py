"""Whether an answer is right: one text against the accepted answers of its question.

`exact`, `contains`, `numeric` and `regex` judge a text that was generated. `choice` and `choice_normalised` judge the
likeliest of a question's choices. `perplexity` is no judgement but a number: how likely the first answer is. These
three need log-probabilities of given texts in place of a generation.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import re2

from crma.core.errors import ConfigError

Scorer = Callable[[str, Sequence[str]], bool]

_NUMBER = re.compile(
    r"(?<![\w.,])[-+−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![.,]?\d)",
    re.ASCII,
)

_MINUS = re.compile(r"(?<!\w)-(?=\.?\d)")
# court's = courts; U.S. = US, but one before a digit is a decimal point and stays; 1,000 = 1000
_DROPPED = re.compile(r"['’]|\.(?!\d)|(?<=\d),(?=\d{3}(?!\d))")


def normalise(text: str) -> str:
    """`text` as it is compared: case folded, without punctuation, single spaces.

    Apostrophes, full stops and thousands' commas vanish ("U.S." is "us"); all other punctuation parts words
    ("check-up" is "check up"). A number keeps its sign and its decimal point: "-2.5" is neither "2.5" nor "25".
    Mathematical and currency signs stay ("C++" is not "C"; but "C#" is, # counts as punctuation). Unicode
    compatibility forms are unified (NFKC), accents are kept: they tell words apart, and an answer set can list both.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    numbers_kept = _DROPPED.sub(
        "", _MINUS.sub("−", folded)
    )  # U+2212 is a mathematical sign, not punctuation
    return " ".join("".join(" " if _parts_words(char) else char for char in numbers_kept).split())


def _parts_words(char: str) -> bool:
    category = unicodedata.category(char)  # P* punctuation, Sk stand-alone modifiers: ` and ^
    return char != "." and (category[0] == "P" or category == "Sk")


def exact(text: str, answers: Sequence[str]) -> bool:
    """Right if the whole text is one of the answers, once normalised. An answer of punctuation alone never matches."""
    found = normalise(text)
    return found != "" and any(found == normalise(answer) for answer in answers)


def contains(text: str, answers: Sequence[str]) -> bool:
    """Right if an answer's words stand in the text, in order and side by side: "law" is not in "lawn".

    Lenient by nature: "not law" contains "law", and a text that lists every label contains the right one.
    """
    found = f" {normalise(text)} "
    return any(f" {wanted} " in found for wanted in map(normalise, answers) if wanted)


def number_in(text: str) -> float | None:
    """The last number in a text: "1,234.5", "-.5" and "2e3" are numbers; "12,5", "1.2.3", "x12" and "10²" have none."""
    found = [
        match
        for match in _NUMBER.finditer(text)
        if unicodedata.category(text[match.end() :][:1] or " ") != "No"
    ]
    number = float(found[-1][0].replace(",", "").replace("−", "-")) if found else math.inf
    return number if math.isfinite(number) else None


def numeric(
    text: str, answers: Sequence[str], *, tolerance: float = 0.0, relative_tolerance: float = 0.0
) -> bool:
    """Right if the last number of the text is as near to an answer as one of the tolerances allows: |text - answer| <=
    max(tolerance, relative_tolerance * |answer|), up to 1e-12 of it for rounding: 1.01 is within .01 of 1. Units are
    not read."""
    found, wanted = (
        number_in(text),
        [number for number in map(number_in, answers) if number is not None],
    )
    if found is None:
        return False
    limits = [
        max(tolerance, relative_tolerance * abs(number)) + 1e-12 * abs(number) for number in wanted
    ]
    return any(abs(found - number) <= limit for number, limit in zip(wanted, limits, strict=True))


def regex(text: str, answers: Sequence[str]) -> bool:
    """Right if one of the answers, which are patterns of RE2, is found in the text. Linear in the text's length."""
    return any(pattern(answer).search(text) is not None for answer in answers)


@lru_cache(256)
def pattern(source: str) -> Any:
    """Compiled by RE2 within 1 MiB. Raises re2.error."""
    options = re2.Options()
    options.max_mem, options.log_errors = 1 << 20, False
    return re2.compile(source, options)


def among(text: str, answers: Sequence[str]) -> bool:
    """Right if the choice is one of the answers, to the letter."""
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
}
SCORERS = {**SCORERS, "choice": among, "choice_normalised": among, "perplexity": among}


def scorer(name: str, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> Scorer:
    """The scorer of that name; ConfigError names those there are, and refuses tolerances where they mean nothing."""
    if name not in SCORERS:
        raise ConfigError(
            f"There is no scorer {name!r}.", field="scorer", value=name, allowed=list(SCORERS)
        )
    if name == "numeric":
        return partial(numeric, tolerance=tolerance, relative_tolerance=relative_tolerance)
    if tolerance or relative_tolerance:
        raise ConfigError(
            "Only numeric has tolerances.", field="tolerance", value=tolerance, allowed=0
        )
    return SCORERS[name]


def check_answers(name: str, place: str, answers: Sequence[str], choices: Sequence[str]) -> None:
    """ConfigError, whose field begins with `place`, for a question that the scorer cannot judge."""
    for i, answer in enumerate(answers):
        problem = "has no number" if name == "numeric" and number_in(answer) is None else None
        if name == "regex":
            try:
                pattern(answer)
            except re2.error as error:
                problem = f"is no pattern of RE2: {error}"
        if problem:
            field = f"{place}.answers[{i}]"
            raise ConfigError(
                f"{field} {problem}.",
                field=field,
                value=answer,
                allowed="what the scorer can compare",
            )
    if name.startswith("choice") and not choices:
        raise ConfigError(
            f"{place} has no choices.",
            field=f"{place}.choices",
            value=[],
            allowed="2 or more texts",
        )


def continuations(name: str, answers: Sequence[str], choices: Sequence[str]) -> Sequence[str]:
    """The texts whose likelihoods the scorer needs; none where it judges a generation."""
    return choices if name.startswith("choice") else answers[:1] if name == "perplexity" else ()


def likeliest(name: str, texts: Sequence[str], likelihoods: Sequence[Likelihood]) -> str:
    """The text of the largest log-probability, the first of equals; `choice_normalised`: of the largest for each of its
    characters, as lm-eval's acc_norm, so that a long choice is not less likely for being long."""
    per = [len(text) if name == "choice_normalised" else 1 for text in texts]
    return max(
        zip(texts, likelihoods, per, strict=True), key=lambda each: each[1].logprob / each[2]
    )[0]
