"""What `model` may name in OpenAI's requests, and what is said of a name that it may not."""

import pytest
from api import Served, refused

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        ("medcal", "['base', 'legal', 'medical']"),
        ("medical@v9", "['medical@v1']"),
    ],
)
async def test_an_unknown_model_lists_what_model_may_name(
    served: Served, model: str, allowed: str
) -> None:
    error = await refused(
        served, 404, "model_not_found", path=PATH, json={"model": model, "prompt": "Hi"}
    )
    assert error["message"].endswith(f"(allowed: {allowed})")


async def test_a_suffix_that_an_adapter_cannot_have_lists_names_and_not_digests(
    served: Served,
) -> None:
    body = {"model": "legal:crma-on", "prompt": "Hi"}
    error = await refused(served, 409, "lineage_mismatch", path=PATH, json=body)
    assert error["param"] == "model"
    assert error["message"] == (
        "legal@v1 was trained without CRMA: use it with CRMA off. (allowed: ['legal:crma-off'])"
    )
