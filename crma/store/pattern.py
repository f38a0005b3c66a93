"""Regular expressions from an adapter's config, matched as PEFT matches them, in bounded time.

PEFT uses Python's `re`, which can take exponential time: a config could hang whoever reads it. RE2
cannot, and gives the same answer for every pattern that both know. The few that only `re` knows
(those that look around, or refer back) are accepted if they are simple.
"""

import re
from functools import lru_cache
from typing import Any

import re2

from crma.core.files import invalid

MAX_LENGTH = 4096
_MAX_BYTES = 2**20  # of a compiled pattern
_MAX_SIMPLE_LENGTH = 256
_MAX_QUANTIFIERS = 3  # one of them is PEFT's own
_QUANTIFIER = re.compile(r"(?<!\\)[*+{]|(?<![\\()])\?")  # neither (?=…) nor (…)? takes time


@lru_cache(1024)
def compile_pattern(field: str, pattern: str) -> Any:
    """A pattern, compiled; its methods are those of Python's patterns.

    Args:
        field: where it comes from, for the error.
        pattern: the whole expression that PEFT matches.

    Raises:
        InvalidAdapter: it is no pattern, or one that could take too long.
    """
    if len(pattern) > MAX_LENGTH:
        raise invalid("The pattern is too long.", field, pattern, f"<= {MAX_LENGTH} characters")
    options = re2.Options()
    options.max_mem = _MAX_BYTES
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error:
        return _compile_simple(field, pattern)


def _compile_simple(field: str, pattern: str) -> re.Pattern[str]:
    try:
        found = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise invalid(f"Not a pattern: {error}.", field, pattern, "a regular expression") from error
    num_quantifiers = len(_QUANTIFIER.findall(pattern))
    repeats_a_group = re.search(r"\)[*+{]", pattern) is not None
    is_long = len(pattern) > _MAX_SIMPLE_LENGTH
    if is_long or num_quantifiers > _MAX_QUANTIFIERS or repeats_a_group:
        message = "The pattern is too complex for one that RE2 does not know."
        allowed = f"an RE2 pattern, or <= {_MAX_QUANTIFIERS} quantifiers and none after a group"
        raise invalid(message, field, pattern, allowed)
    return found
