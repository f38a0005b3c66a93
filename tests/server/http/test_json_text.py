"""server.http.json_text: as JSONResponse writes it, in pieces."""

from typing import Any

import pytest
from fastapi.responses import JSONResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.http.json_text import json_text

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
VALUES = st.recursive(
    SCALARS | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES)
def test_it_is_what_json_response_writes(value: Any) -> None:
    try:
        expected = JSONResponse(value).body
    except UnicodeEncodeError:  # half a surrogate pair
        with pytest.raises(UnicodeEncodeError):
            json_text(value)
        return
    assert json_text(value) == expected


def test_what_json_does_not_have_is_refused_as_there() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        json_text({"a": [float("nan")]})
