"""GET /v1/models: OpenAI's cards with vLLM's fields."""

import pytest
from api import BASE, Served, refused

from server.http.body import EXAMPLES


def example(path: str) -> dict[str, object]:
    return EXAMPLES[path]["answers"]["application/json"]["example"]


async def test_the_cards_have_vllms_fields_and_say_what_answers(served: Served) -> None:
    body = (await served.client.get("/v1/models")).json()
    assert list(body) == list(example("/v1/models"))
    base, legal, medical = body["data"]
    assert [list(card) for card in body["data"]] == [list(example("/v1/models/{model}"))] * 3
    assert [card["id"] for card in body["data"]] == ["base", "legal", "medical"]
    assert (base["root"], base["parent"]) == (BASE.name, None)
    assert (legal["root"], legal["parent"]) == ("legal@v1", "base")
    assert {card["max_model_len"] for card in body["data"]} == {128}
    assert medical["permission"][0]["allow_sampling"] is True
    assert list(medical["permission"][0]) == list(
        EXAMPLES["/v1/models/{model}"]["answers"]["application/json"]["example"]["permission"][0]
    )


@pytest.mark.parametrize(
    ("model", "answers", "parent"),
    [
        ("base", BASE.name, None),
        ("base:crma-on", BASE.name, None),
        ("medical", "medical@v1", "base"),
        ("medical@v1:crma-off", "medical@v1", "base"),
    ],
)
async def test_a_card_of_any_name_says_which_version_answers(
    served: Served, model: str, answers: str, parent: str | None
) -> None:
    response = await served.client.get(f"/v1/models/{model}")
    assert response.status_code == 200, response.text
    card = response.json()
    assert (card["id"], card["root"], card["parent"]) == (model, answers, parent)


async def test_a_card_of_an_unknown_model_is_refused_by_name(served: Served) -> None:
    response = await served.client.get("/v1/models/medcal")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    error = await refused(
        served, 404, "model_not_found", path="/v1/completions", json={"model": "x", "prompt": "Hi"}
    )
    assert error["param"] == "model"
