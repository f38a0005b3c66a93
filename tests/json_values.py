"""JSON of any kind, as a hostile file or client may send it."""

from typing import Any

from hypothesis import strategies as st


def json_values(max_leaves: int = 8) -> st.SearchStrategy[Any]:
    """Values that `json.dumps` writes: huge numbers, NaN and lone surrogates are among them."""
    huge = st.sampled_from([10**309, -(10**309), 1e308, float("nan"), float("inf"), 2**63])
    texts = st.text(st.characters(exclude_categories=()), max_size=20)
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | huge | texts
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=max_leaves,
    )
