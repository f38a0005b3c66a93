"""JSON of any kind, as a hostile file or client may send it."""

from typing import Any

from hypothesis import strategies as st

SCALARS: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 2**63, 10**309, -(10**309), 1e308),
    *(float("nan"), float("inf"), "", " ", "a", "-1", "\0", "\u2028", "\ud800", "\ufdfa" * 300),
)
VALUES = (
    *SCALARS,
    *([each] for each in SCALARS),
    *({"a": each} for each in SCALARS),
    *({str(each): each} for each in SCALARS),
    *([each, each] for each in SCALARS),
    *([[], {}], {"a": {"a": []}}, [[[[[[]]]]]]),
)


def json_values() -> st.SearchStrategy[Any]:
    """Values that `json.dumps` writes; drawn from a list, because nesting them is slow."""
    return st.sampled_from(VALUES)
