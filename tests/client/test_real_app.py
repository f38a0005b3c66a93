"""The client and the real server, on a tiny real model: each understands what the other says."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
import tiny
from crma_client import AsyncClient, Client, errors
from crma_client.types import read_generation

from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore

OPTIONS: dict[str, Any] = {
    "task": "medical",
    "max_tokens": 6,
    "temperature": 1.0,
    "seed": 3,
    "logprobs": True,
}
QUESTION = {"id": "q1", "task": "medical", "question": "One?", "answers": ["x"]}
ABLATION: dict[str, Any] = {"questions": [QUESTION], "max_tokens": 4}


@pytest.fixture
async def client(base: BaseModel, store: AdapterStore) -> AsyncIterator[AsyncClient]:
    async with tiny.serving(
        base, store.root, api_keys=("key",), evaluations=store.root.parent / "kept"
    ) as app:
        yield AsyncClient("http://test", api_key="key", transport=httpx.ASGITransport(app))


async def test_an_answer_its_stream_and_where_they_came_from(client: AsyncClient) -> None:
    for n in (1, 2):
        whole = await client.generate("Hi", n=n, **OPTIONS)
        async with client.stream("Hi", n=n, **OPTIONS) as stream:
            with pytest.raises(errors.ProtocolError):
                stream.result  # noqa: B018
            assert {token.index async for token in stream} == set(range(n))
            assert [token async for token in stream] == [], (
                "a second pass finds nothing and asks nothing"
            )
        assert stream.result.choices == whole.choices
        assert (stream.result.usage, stream.result.provenance) == (whole.usage, whole.provenance)
    assert (len(whole.choices[0].logprobs or ()), whole.crma, whole.provenance["seed"]) == (
        6,
        True,
        3,
    )
    listing = await client.adapters()
    assert [(task["name"], task["resident"]) for task in listing["tasks"]] == [
        ("legal", False),
        ("medical", True),
    ]
    digests = [
        used["digest"] for used in (listing["tasks"][1], listing["base"], listing["backbone"])
    ]
    assert digests == [whole.provenance[name] for name in ("task", "base", "crma")]


def ask_everything(client: Client) -> list[Any]:
    answer = client.generate("Hi", **OPTIONS)
    with client.stream("Hi", **OPTIONS) as stream:
        tokens = list(stream)
    states = client.health(), client.ready(), "# TYPE crma_" in client.metrics()
    report = client.ablation(**ABLATION)
    return [
        answer.choices,
        tokens,
        stream.result.choices,
        report["variants"],
        client.adapters(),
        states,
    ]


async def test_the_blocking_client_gives_the_same(client: AsyncClient) -> None:
    loop, http = asyncio.get_running_loop(), client._http

    def handler(request: httpx.Request) -> httpx.Response:
        """In a thread, while the loop that the app runs in waits."""
        answer = asyncio.run_coroutine_threadsafe(http.send(request), loop).result()
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    with Client("http://test", api_key="key", transport=httpx.MockTransport(handler)) as same:
        blocking = await asyncio.to_thread(ask_everything, same)
    answer = await client.generate("Hi", **OPTIONS)
    async with client.stream("Hi", **OPTIONS) as stream:
        tokens = [token async for token in stream]
    states = await client.health(), await client.ready(), "# TYPE crma_" in await client.metrics()
    report, listing = await client.ablation(**ABLATION), await client.adapters()
    assert states == (True, True, True)
    assert blocking == [answer.choices, tokens, answer.choices, report["variants"], listing, states]
    assert (answer.text, answer.finish_reason) == (
        "".join(token.text for token in tokens),
        "length",
    )


async def test_an_ablation_in_the_background_on_a_set_of_ones_own(client: AsyncClient) -> None:
    lines = json.dumps(QUESTION).encode()
    with pytest.raises(errors.StatusError, check=lambda error: error.status == 403):
        await client.upload_question_set("mine", lines)
    admin = AsyncClient("http://test", api_key="admin", transport=client._http._transport)
    await admin.upload_question_set("mine", lines)
    assert [each["name"] for each in await client.question_sets()] == ["mine", "public"]
    body = {"question_set": "mine", "max_tokens": 4}
    started = await client.ablation(**body, background=True)
    while (job := await client.ablation_job(started["id"]))["status"] == "running":
        pass
    direct = await client.ablation(**body)
    assert (job["status"], job["result"]["variants"], job["result"]["items"]) == (
        "done",
        *map(direct.get, ("variants", "items")),
    )
    assert (await client.cancel_ablation(started["id"]))["status"] == "done"
    for unknown in ("abl-0", "../x"):
        with pytest.raises(errors.NotFound):
            await client.ablation_job(unknown)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in it with each of its keys."""
    for key in (
        value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from places(value[key])


async def test_a_damaged_answer_is_an_error_of_the_tree_and_one_that_says_more_is_read(
    client: AsyncClient,
) -> None:
    """One value anywhere replaced by other JSON: never a TypeError or KeyError out of the client."""
    answer = await client.generate("Hi", n=2, **OPTIONS)
    body = json.loads(json.dumps({**answer.raw, "later": 1}))
    assert read_generation(body) == replace(answer, raw=body)
    num_refused = 0
    for container, key in places(body):
        kept = container[key]
        for container[key] in (None, True, 1, "x", [], {}, [None], {"index": []}):
            try:
                assert read_generation(body).raw == body
            except errors.ProtocolError:
                num_refused += 1
        container[key] = kept
    assert num_refused > 50


async def test_a_refusal_is_the_right_error_and_says_where(client: AsyncClient) -> None:
    refused = {"task": "legal", "crma": True}
    with pytest.raises(errors.Conflict) as whole:
        await client.generate("Hi", **refused)
    with pytest.raises(errors.Conflict) as streamed:
        async with client.stream("Hi", **refused):
            pytest.fail("a refused stream was opened")
    for caught in (whole.value, streamed.value):
        assert (caught.code, caught.field, caught.allowed is not None) == (
            "lineage_mismatch",
            "crma",
            True,
        )
