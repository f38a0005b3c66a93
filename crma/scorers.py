"""Whether an answer is right: one text against the accepted answers of its question."""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from crma.errors import ConfigError

Scorer = Callable[[str, Sequence[str]], bool]

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
    numbers_kept = _DROPPED.sub("", _MINUS.sub("−", folded))  # U+2212 is a mathematical sign, not punctuation
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


SCORERS: Mapping[str, Scorer] = {"exact": exact, "contains": contains}


def scorer(name: str) -> Scorer:
    """The scorer of that name; ConfigError names those there are."""
    if name not in SCORERS:
        raise ConfigError(f"There is no scorer {name!r}.", field="scorer", value=name, allowed=list(SCORERS))
    return SCORERS[name]
