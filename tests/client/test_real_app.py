"""The clients against the real server on a tiny real model."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from crma_client import AsyncClient, Client, errors
from crma_client.calls import ChatOptions, GenerateOptions
from crma_client.types import read_generation

import server
from crma.models.base_model import BaseModel
from crma.models.prompts import BASE_TEMPLATE, RAW_FORMAT, TemplateFormat
from crma.store.adapter_store import AdapterStore
from server.http.openai_schemas import ChatRequest
from server.http.schemas import GenerateRequest

OPTIONS: dict[str, Any] = {
    "task": "medical",
    "max_tokens": 6,
    "temperature": 1.0,
    "seed": 3,
    "logprobs": True,
}
MESSAGES = [{"role": "user", "content": "Hi"}]
QUESTION = {"id": "q1", "task": "medical", "question": "One?", "answers": ["x"]}
ABLATION: dict[str, Any] = {"questions": [QUESTION], "max_tokens": 4}


@pytest.fixture
async def client(base: BaseModel, store: AdapterStore) -> AsyncIterator[AsyncClient]:
    evaluations = store.root.parent / "kept"
    async with tiny.serving(base, store.root, api_keys=("key",), evaluations=evaluations) as app:
        transport = httpx.ASGITransport(app)
        yield AsyncClient("http://test", api_key="key", transport=transport)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_ends_in_the_answer_that_generate_gives(client: AsyncClient, n: int) -> None:
    whole = await client.generate("Hi", n=n, **OPTIONS)
    async with client.stream("Hi", n=n, **OPTIONS) as stream:
        with pytest.raises(errors.ProtocolError):
            stream.result  # noqa: B018
        assert {token.index async for token in stream} == set(range(n))
        second_pass = [token async for token in stream]
        assert second_pass == []
    assert stream.result.choices == whole.choices
    assert stream.result.usage == whole.usage
    assert stream.result.provenance == whole.provenance
    assert len(whole.choices[0].logprobs or ()) == 6


async def test_every_option_of_generate_can_be_sent(client: AsyncClient) -> None:
    not_options = {"prompt", "stream", "max_completion_tokens"}  # the last has another name
    assert (
        GenerateOptions.__annotations__.keys() == GenerateRequest.model_fields.keys() - not_options
    )
    answer = await client.generate(
        "Hi",
        max_tokens=4,
        min_tokens=2,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        logit_bias={34: 100.0},
        stop_token_ids=[5],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=True,
        top_logprobs=1,
        prompt_logprobs=True,
    )
    assert answer.text == "AAAA"
    assert len(answer.raw["top_logprobs"]) == 4
    assert answer.raw["prompt_logprobs"][0] is None


async def test_an_answer_names_the_adapters_that_produced_it(client: AsyncClient) -> None:
    answer = await client.generate("Hi", **OPTIONS)
    assert answer.crma is True
    assert answer.provenance["seed"] == 3
    listing = await client.adapters()
    resident = {task["name"]: task["resident"] for task in listing["tasks"]}
    assert resident == {"legal": False, "medical": True}
    legal, medical = listing["tasks"]
    assert (legal["name"], medical["name"]) == ("legal", "medical")
    assert answer.provenance["task"] == medical["digest"]
    assert answer.provenance["base"] == listing["base"]["digest"]
    assert answer.provenance["crma"] == listing["backbone"]["digest"]


def call_everything(client: Client) -> dict[str, Any]:
    """What the blocking client returns from each method, comparable with the async client's."""
    answer = client.generate("Hi", **OPTIONS)
    with client.stream("Hi", **OPTIONS) as stream:
        tokens = list(stream)
    return {
        "choices": answer.choices,
        "tokens": tokens,
        "stream choices": stream.result.choices,
        "health": client.health(),
        "ready": client.ready(),
        "metrics": "# TYPE crma_" in client.metrics(),
        "variants": client.ablation(**ABLATION)["variants"],
        "adapters": client.adapters(),
        "tokens of a prompt": client.tokenize("Hi", return_token_strs=True),
        "tokens of a talk": client.tokenize(messages=MESSAGES, model="legal"),
        "text": client.detokenize((5, 9)),
        "usage": client.usage(date(2026, 1, 1), "2026-01-31", task="legal", by=("day", "key")),
    }


async def call_everything_async(client: AsyncClient) -> dict[str, Any]:
    """As `call_everything`."""
    answer = await client.generate("Hi", **OPTIONS)
    async with client.stream("Hi", **OPTIONS) as stream:
        tokens = [token async for token in stream]
    report = await client.ablation(**ABLATION)
    return {
        "choices": answer.choices,
        "tokens": tokens,
        "stream choices": stream.result.choices,
        "health": await client.health(),
        "ready": await client.ready(),
        "metrics": "# TYPE crma_" in await client.metrics(),
        "variants": report["variants"],
        "adapters": await client.adapters(),
        "tokens of a prompt": await client.tokenize("Hi", return_token_strs=True),
        "tokens of a talk": await client.tokenize(messages=MESSAGES, model="legal"),
        "text": await client.detokenize((5, 9)),
        "usage": await client.usage(
            date(2026, 1, 1), "2026-01-31", task="legal", by=("day", "key")
        ),
    }


def blocking(client: AsyncClient, api_key: str) -> Client:
    """A blocking client, for another thread, of the app that an async one talks to."""
    loop = asyncio.get_running_loop()

    def handler(request: httpx.Request) -> httpx.Response:
        """Hands the request to the loop in which the app runs."""
        content = request.read()
        again = httpx.Request(request.method, request.url, headers=request.headers, content=content)
        sent = client._http.send(again)
        answer = asyncio.run_coroutine_threadsafe(sent, loop).result()
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    return Client("http://test", api_key=api_key, transport=httpx.MockTransport(handler))


async def test_the_blocking_client_returns_the_same_as_the_async_client(
    client: AsyncClient,
) -> None:
    with blocking(client, "key") as blocking_client:
        returned = await asyncio.to_thread(call_everything, blocking_client)
    awaited = await call_everything_async(client)
    assert returned == awaited
    assert awaited["health"] is awaited["ready"] is awaited["metrics"] is True
    assert awaited["stream choices"] == awaited["choices"]
    assert awaited["usage"] == {"from": "2026-01-01", "to": "2026-01-31", "usage": []}
    (choice,) = awaited["choices"]
    assert choice.text == "".join(token.text for token in awaited["tokens"])
    assert choice.finish_reason == "length"


async def test_a_folder_is_uploaded_and_deleted_by_either_client(
    client: AsyncClient, store: AdapterStore, tmp_path: Path
) -> None:
    admin = AsyncClient("http://test", api_key="admin", transport=client._http._transport)
    folder = store.task("legal").path
    first = await admin.upload_adapter("new", folder, licence="MIT")
    with blocking(client, "admin") as blocking_admin:
        second = await asyncio.to_thread(blocking_admin.upload_adapter, "new", str(folder))
    assert (first["version"], second["version"]) == ("v1", "v2")
    assert store.task("new", "v1").manifest.licence == "MIT"
    assert (await client.generate("Hi", task="new", max_tokens=2)).text
    with pytest.raises(errors.Conflict, match="serves"):
        await admin.delete_adapter("new@v2")
    with blocking(client, "admin") as blocking_admin:
        deleted = await asyncio.to_thread(blocking_admin.delete_adapter, "new@v1")
        acts = await asyncio.to_thread(lambda: blocking_admin.audit(who="admin", what="publish"))
    assert deleted == {"name": "new", "deleted": ["v1"]}
    assert [act["version"] for act in acts] == ["v2", "v1"]
    (newest,) = await admin.audit(limit=1, who="admin")
    assert (newest["what"], newest["version"]) == ("delete", "v1")
    assert newest not in await admin.audit(before=newest["id"])
    with pytest.raises(errors.NotFound):
        await admin.delete_adapter("a/../b")
    with pytest.raises(errors.InvalidArgument, check=lambda error: error.field == "folder"):
        await admin.upload_adapter("new", tmp_path)
    with pytest.raises(errors.StatusError, check=lambda error: error.status == 403):
        await client.upload_adapter("new", folder)


async def test_an_uploaded_folder_brings_its_own_chat_template_unless_told_otherwise(
    client: AsyncClient, store: AdapterStore, tmp_path: Path
) -> None:
    admin = AsyncClient("http://test", api_key="admin", transport=client._http._transport)
    folder = shutil.copytree(store.task("legal").path, tmp_path / "peft")
    template = "{% for message in messages %}Q: {{ message['content'] }}\nA: {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    for prompt_format, expected in (
        (None, TemplateFormat(template)),
        ("chat", BASE_TEMPLATE),
        ("raw", RAW_FORMAT),
    ):
        info = await admin.upload_adapter("own", folder, prompt_format=prompt_format)
        assert store.task("own", info["version"]).prompt_format == expected


async def test_an_administrator_says_what_is_in_memory_and_what_serves(
    client: AsyncClient, store: AdapterStore
) -> None:
    admin = AsyncClient("http://test", api_key="admin", transport=client._http._transport)
    assert (await admin.load_adapter("medical"))["resident"] is True
    assert (await admin.unload_adapter("medical", "wait"))["resident"] is False
    assert (await admin.pin_adapter("legal@v1"))["resident"] is True
    with pytest.raises(errors.Conflict):
        await admin.unload_adapter("legal")
    await admin.unpin_adapter("legal@v1")
    assert (await admin.upload_adapter("legal", store.task("legal").path))["version"] == "v2"
    assert (await admin.roll_back_adapter("legal"))["version"] == "v1"
    legal = await client.adapter("legal")
    assert (legal["serving"], [each["version"] for each in legal["versions"]]) == (
        "v1",
        ["v1", "v2"],
    )
    await admin.stop_adapter("legal")
    with pytest.raises(errors.NotFound):
        await client.adapter("legal")
    backbones = await client.backbones()
    assert (backbones["serving"], backbones["promotion"]) == ("v1", None)
    with pytest.raises(errors.NotFound, match="No backbone served before"):
        await admin.roll_back_backbone()
    with pytest.raises(errors.NotFound):
        await admin.promotion()
    with pytest.raises(errors.NotFound, check=lambda error: error.field == "version"):
        await admin.promote_backbone("v9", allow_ungated=["medical"])
    with pytest.raises(errors.NotAuthorized):
        await client.cancel_promotion()


async def test_what_the_server_keeps_is_read(client: AsyncClient) -> None:
    questions = await client.question_set("public")
    report = await client.ablation(questions=questions[:2], max_tokens=4)
    assert report["question_set"]["items"] == 2
    run = (await client.runs())[0]
    assert (await client.run(run["id"]))["seed"] == run["seed"]
    assert await client.version() == server.__version__


async def test_a_question_set_of_a_key_is_its_own(client: AsyncClient) -> None:
    kept = await client.upload_question_set("mine", json.dumps(QUESTION).encode())
    assert (kept["name"], kept["source"]) == ("mine", "own")
    assert (await client.delete_question_set("mine"))["deleted"] is True


async def test_a_background_ablation_on_an_uploaded_set_gives_the_direct_report(
    client: AsyncClient,
) -> None:
    admin = AsyncClient("http://test", api_key="admin", transport=client._http._transport)
    await admin.upload_question_set("mine", json.dumps(QUESTION).encode())
    names = [question_set["name"] for question_set in await client.question_sets()]
    assert names == ["mine", "public"]
    body = {"question_set": "mine", "max_tokens": 4}
    started = await client.ablation(**body, background=True)
    job = await client.ablation_job(started["id"])
    while job["status"] == "running":
        job = await client.ablation_job(started["id"])
    direct = await client.ablation(**body)
    assert job["status"] == "done"
    assert job["result"]["variants"] == direct["variants"]
    assert job["result"]["items"] == direct["items"]
    cancelled = await client.cancel_ablation(started["id"])
    assert cancelled["status"] == "done"
    assert [job["id"] for job in await client.ablation_jobs()] == [started["id"]]
    await admin.delete_question_set("mine")
    with pytest.raises(errors.NotFound):
        await client.ablation(**body)


@pytest.mark.parametrize("unknown", ["abl-0", "../x"])
async def test_an_unknown_job_is_not_found(client: AsyncClient, unknown: str) -> None:
    with pytest.raises(errors.NotFound):
        await client.ablation_job(unknown)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside a JSON value, with each of its keys or indices."""
    keys: Any = ()
    if isinstance(value, dict):
        keys = value
    elif isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        yield value, key
        yield from places(value[key])


async def test_an_answer_with_an_unknown_field_is_read(client: AsyncClient) -> None:
    answer = await client.generate("Hi", n=2, **OPTIONS)
    body = {**answer.raw, "later": 1}
    assert read_generation(body) == replace(answer, raw=body)


async def test_a_damaged_answer_is_read_or_raises_a_protocol_error(client: AsyncClient) -> None:
    """Any one value replaced by other JSON never makes the client raise TypeError or KeyError."""
    answer = await client.generate("Hi", n=2, **OPTIONS)
    body = json.loads(json.dumps({**answer.raw, "later": 1}))
    num_refused = 0
    for container, key in places(body):
        original = container[key]
        for damage in (None, True, 1, "x", [], {}, [None], {"index": []}):
            container[key] = damage
            try:
                assert read_generation(body).raw == body
            except errors.ProtocolError:
                num_refused += 1
        container[key] = original
    assert num_refused > 50


async def test_a_refusal_names_the_field_and_the_allowed_values(client: AsyncClient) -> None:
    refused = {"task": "legal", "crma": True}
    with pytest.raises(errors.Conflict) as whole:
        await client.generate("Hi", **refused)
    with pytest.raises(errors.Conflict) as streamed:
        async with client.stream("Hi", **refused):
            pytest.fail("a refused stream was opened")
    for error in (whole.value, streamed.value):
        assert error.code == "lineage_mismatch"
        assert error.field == "crma"
        assert error.allowed is not None


async def test_a_job_reports_its_progress_and_ends_in_the_direct_report(
    client: AsyncClient,
) -> None:
    seen: list[tuple[int, int]] = []
    report = await client.run_ablation(lambda *progress: seen.append(progress), **ABLATION)
    direct = await client.ablation(**ABLATION)
    assert report["variants"] == direct["variants"]
    assert seen == sorted(seen)
    assert seen[-1] == (2, 2)
    (job,) = await client.ablation_jobs()
    assert await client.wait_for_ablation(job["id"]) == report


async def test_a_chat_is_answered_by_both_clients_streamed_or_not(client: AsyncClient) -> None:
    options: dict[str, Any] = {"task": "legal", "max_tokens": 6, "temperature": 0}
    whole = await client.chat(MESSAGES, **options)
    async with client.stream_chat(MESSAGES, logprobs=True, **options) as stream:
        tokens = [token async for token in stream]
    assert stream.result.text == whole.text
    assert stream.result.usage == whole.usage
    assert stream.result.provenance == whole.provenance
    assert all(token.logprob is not None for token in tokens)
    with blocking(client, "key") as blocking_client:
        blocked = await asyncio.to_thread(lambda: blocking_client.chat(MESSAGES, **options))
    assert (blocked.choices, blocked.usage) == (whole.choices, whole.usage)


async def test_every_sampling_option_of_a_chat_can_be_sent(client: AsyncClient) -> None:
    known = ChatRequest.model_fields.keys()
    assert ChatOptions.__annotations__.keys() - known == {"task"}  # which is its model
    answer = await client.chat(
        MESSAGES,
        max_tokens=4,
        min_tokens=2,
        logit_bias={34: 100.0},
        seed=1,
        n=2,
        response_format={"type": "text"},
        tool_choice="none",
    )
    assert [choice.text for choice in answer.choices] == ["AAAA", "AAAA"]
