"""Both clients against an app that speaks the contract. The test against the real server is in test_real_app."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from crma_client import AsyncClient, Client, CrmaClientError, Question, errors
from starlette.applications import Starlette

from .conftest import KEY

ROOT = Path(__file__).parents[2]
QUESTIONS = [Question("q1", "medical", "?", ("x",))]


def sync_client(app: Starlette, **options: Any) -> Client:
    """A blocking client whose requests the ASGI app answers; for use outside a running event loop."""

    async def ask(request: httpx.Request) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
            return await http.request(request.method, request.url, content=request.content, headers=request.headers)

    def handler(request: httpx.Request) -> httpx.Response:
        answer = asyncio.run(ask(request))
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    return Client(transport=httpx.MockTransport(handler), **options)


def async_client(app: Starlette, **options: Any) -> AsyncClient:
    return AsyncClient(transport=httpx.ASGITransport(app), **options)


CALLS = [
    ("generate", ("one two",), {"task": "medical", "crma": True, "seed": 7}),
    ("generate", ("one two",), {"n": 3, "stop": ("a", "b")}),
    ("ablation", (), {"question_set": "public", "variants": ["task+crma", "task"], "margin": 0.02}),
    ("ablation", (), {"questions": QUESTIONS}),
    ("adapters", (), {}),
    ("health", (), {}),
    ("ready", (), {}),
    ("metrics", (), {}),
]


@pytest.mark.parametrize(("method", "args", "options"), CALLS)
async def test_both_clients_give_the_same_answer(app: Starlette, method: str, args: Any, options: Any) -> None:
    def blocking() -> object:
        with sync_client(app, api_key=KEY) as client:
            return getattr(client, method)(*args, **options)

    async with async_client(app, api_key=KEY) as client:
        assert await getattr(client, method)(*args, **options) == await asyncio.to_thread(blocking)


def test_the_two_clients_have_the_same_methods() -> None:
    names = {name.removeprefix("a") if name == "aclose" else name for name in vars(AsyncClient) if name[0] != "_"}
    assert names == {name for name in vars(Client) if name[0] != "_"}


async def test_an_answer_is_typed_and_keeps_what_it_does_not_know(app: Starlette) -> None:
    async with async_client(app, api_key=KEY) as client:
        answer = await client.generate("one two", task="medical", crma=True)
        assert (answer.text, answer.finish_reason, answer.task, answer.crma) == ("ONE TWO", "stop", "medical", True)
        assert (answer.usage.completion_tokens, answer.provenance.seed, answer.timings.e2e_s) == (2, 7, 0.08)
        assert answer.raw["added_later"]["sent"] == {"prompt": "one two", "task": "medical", "crma": True}
        report = await client.ablation(question_set="public")
        assert report.variants["task+crma"].wilson == (0.62, 0.8)
        assert report.variants["task"].wilson is None
        assert (report.comparisons[0].mcnemar.gained, report.comparisons[0].bootstrap) == (69, (0.58, 0.77))
        assert report.items[0].outputs["task"]["status"] == "failed", "a failure is not a score"
        listing = await client.adapters()
        assert listing.backbone is not None
        assert listing.tasks[0].target_modules == ("q_proj", "v_proj")


async def test_a_stream_gives_tokens_then_the_whole_answer(app: Starlette) -> None:
    async with async_client(app) as client, client.stream("one two", seed=7) as stream:
        with pytest.raises(errors.ProtocolError):
            stream.result  # noqa: B018
        assert [(token.index, token.text, token.logprob) async for token in stream] == [
            (0, "ONE", -1.0),
            (0, "TWO", -1.0),
        ]
        assert (stream.result.text, stream.result.finish_reason, stream.result.id) == ("ONETWO", "stop", "gen-1")
        assert [token async for token in stream] == [], "a second pass finds nothing and asks nothing"


def test_the_blocking_stream_gives_the_same(app: Starlette) -> None:
    with sync_client(app) as client, client.stream("one two") as stream:
        assert [token.text for token in stream] == ["ONE", "TWO"]
    assert stream.result.text == "ONETWO"


def test_a_stream_that_fails_or_breaks_gives_its_tokens_and_then_an_error(app: Starlette) -> None:
    """Also when the network delivers the tokens and the error in one piece."""
    for prompt, kind in (("fail", errors.GenerationFailed), ("break", errors.ProtocolError)):
        seen = []
        with pytest.raises(kind) as caught, sync_client(app) as client, client.stream(prompt) as stream:
            seen.extend(token.text for token in stream)
        assert seen == [prompt.upper()]
    assert caught.value.status is None


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 429, 500, 503, 504])
async def test_a_refusal_is_one_error_for_every_way_to_call(app: Starlette, status: int) -> None:
    async def streamed(client: AsyncClient) -> None:
        async with client.stream("hi", task=str(status)):
            pytest.fail("a refused stream was opened")

    async with async_client(app) as client:
        for refused in (client.generate("hi", task=str(status)), streamed(client)):
            with pytest.raises(errors.StatusError) as caught:
                await refused
            assert (caught.value.status, caught.value.code, caught.value.field) == (status, "as_asked", "task")
            assert (caught.value.value, caught.value.allowed, caught.value.retry_after) == (str(status), ["medical"], 2)


def test_a_refused_blocking_stream_carries_the_servers_words(app: Starlette) -> None:
    with pytest.raises(errors.Overloaded, match="no"), sync_client(app) as client, client.stream("hi", task="429"):
        pytest.fail("a refused stream was opened")


def test_an_answer_that_is_not_the_contracts_is_an_error_of_the_tree(app: Starlette) -> None:
    with sync_client(app) as client:
        with pytest.raises(errors.StatusError, match="502"):
            client.generate("hi", task="proxy")
        with pytest.raises(errors.ProtocolError, match="not JSON"):
            client.generate("hi", task="nonsense")


def test_without_its_key_a_call_is_not_authorized(app: Starlette) -> None:
    with pytest.raises(errors.NotAuthorized), sync_client(app) as client:
        client.adapters()


class BrokenBody(httpx.SyncByteStream):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[bytes]:
        yield b'event: token\ndata: {"index": 0, "text": "a"}\n\n'
        raise self.error


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (httpx.ConnectError("refused"), errors.ConnectionFailed),
        (httpx.ReadTimeout(""), errors.TimedOut),
        (httpx.RemoteProtocolError("closed"), errors.ConnectionFailed),
    ],
)
def test_a_broken_connection_is_an_error_of_the_tree(raised: Exception, kind: type[CrmaClientError]) -> None:
    def unreachable(_: httpx.Request) -> httpx.Response:
        raise raised

    with pytest.raises(kind), Client(transport=httpx.MockTransport(unreachable)) as client:
        client.generate("hi")

    breaking = httpx.MockTransport(lambda _: httpx.Response(200, stream=BrokenBody(raised)))
    with Client(transport=breaking) as client, client.stream("hi") as stream:
        assert next(iter(stream)).text == "a"
        with pytest.raises(kind):
            next(iter(stream))


def test_an_exception_of_the_callers_own_leaves_the_stream_unchanged(app: Starlette) -> None:
    """An httpx error raised inside the block by other code is not the server's."""
    with pytest.raises(httpx.ConnectError), sync_client(app) as client, client.stream("hi"):
        raise httpx.ConnectError("another service")


@pytest.mark.parametrize("base_url", ["", "localhost:8000", "ftp://host", "http://", "http://host:port", None])
def test_a_base_url_that_is_none_is_refused(base_url: Any) -> None:
    with pytest.raises(errors.InvalidArgument):
        Client(base_url)


def test_imports_where_there_is_no_torch_and_no_server() -> None:
    """The package depends on httpx only; a meta-path finder stands in for an environment without the rest."""
    program = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "numpy", "transformers", "server", "crma", "starlette", "pydantic"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import crma_client
print(crma_client.Client().__class__.__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "clients/python", capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("Client\n", "")
