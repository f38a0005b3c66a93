"""Patterns of a config: matched as Python's `re` matches them, and never for long."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crma.core.errors import InvalidAdapter
from crma.store.pattern import MAX_LENGTH, compile_pattern

PIECES = [
    "layers", "q_proj", "mlp", "0", "1", r"\.", ".", ".*", "^", "$", "(q|k)_proj", "[01]", r"\d+",
    "(mlp|self_attn)?", r"(layers\.\d)+", "(?:model)", r"\b", "(?!0)", "(?<=1)",
]  # fmt: skip
PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.10.self_attn.k_proj",
    "lm_head",
]


@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join))
def test_a_pattern_matches_what_python_matches(key: str) -> None:
    pattern = rf"(.*\.)?({key})$"
    try:
        compiled = compile_pattern("rank_pattern", pattern)
    except InvalidAdapter:
        return  # one that RE2 does not know, and that is too complex for `re`
    for path in PATHS:
        assert bool(compiled.match(path)) == bool(re.match(pattern, path))
        assert bool(compiled.fullmatch(path)) == bool(re.fullmatch(pattern, path))


@pytest.mark.parametrize("key", ["(a+)+b", "(a|a)*c", "(.*)*x"])
def test_a_pattern_that_hangs_python_is_matched_at_once(key: str) -> None:
    assert compile_pattern("rank_pattern", rf"(.*\.)?({key})$").match("a" * 1000) is None


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "Not a pattern"),
        ("(?=a)(a+)+b", "too complex"),
        (r"(a*)(a*)(a*)(a*)\1", "too complex"),
        ("a" * (MAX_LENGTH + 1), "too long"),
    ],
)
def test_what_is_no_pattern_or_could_take_long_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(InvalidAdapter, match=reason) as refused:
        compile_pattern("rank_pattern", pattern)
    assert refused.value.field == "rank_pattern"
