"""What the clients send, and how they treat answers that the real server never gives.

`test_real_app.py` tests them against the real server.
"""

import inspect
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from client_methods import public_methods
from crma_client import AsyncClient, Client, CrmaClientError, errors
from crma_client.calls import GenerateOptions, write_body

TOKEN = b'event: token\ndata: {"index": 0, "text": "a"}\n\n'
REFUSAL = {
    "code": "queue_full",
    "message": "full",
    "field": "task",
    "value": "x",
    "allowed": ["medical"],
}


def answering(status: int = 200, **answer: Any) -> httpx.MockTransport:
    """A server, for either client, that gives the same answer to every request."""
    return httpx.MockTransport(lambda _: httpx.Response(status, **answer))


def test_both_clients_have_the_same_methods_with_the_same_signatures() -> None:
    """Only streams return a type of their own: an async stream of tokens."""
    streams = {"stream", "stream_chat"}
    blocking = public_methods(Client)
    awaited = public_methods(AsyncClient)
    assert set(blocking) == set(awaited)
    for name, method in blocking.items():
        own, other = inspect.signature(method), inspect.signature(awaited[name])
        assert own.parameters == other.parameters, name
        assert name in streams or own.return_annotation == other.return_annotation, name
        assert name in streams or inspect.iscoroutinefunction(awaited[name]), name
    assert (
        inspect.signature(Client.__init__).parameters
        == inspect.signature(AsyncClient.__init__).parameters
    )


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_every_method_is_documented(client_class: type) -> None:
    for name, method in public_methods(client_class).items():
        assert inspect.getdoc(method), name


def test_help_on_generate_explains_every_option() -> None:
    documentation = inspect.getdoc(Client.generate) or ""
    for option in GenerateOptions.__annotations__:
        assert f"    {option}: " in documentation, option


def test_only_options_that_were_given_are_sent() -> None:
    """None means that the server decides, also for crma, whose default is not False."""
    fields = {"task": "medical", "crma": None, "raw": False, "temperature": 0, "stop": ("a", "b")}
    assert json.loads(write_body(fields)) == {
        "task": "medical",
        "raw": False,
        "temperature": 0,
        "stop": ["a", "b"],
    }


@pytest.mark.parametrize("value", [b"x", {1}])
def test_an_option_that_has_no_form_in_json_is_refused(value: object) -> None:
    with pytest.raises(errors.InvalidArgument, check=lambda error: error.field == "body"):
        write_body({"task": value})


LATE_ERROR = b'event: error\ndata: {"error": {"message": "late", "code": "deadline"}}\n\n'
ENDINGS = [
    (LATE_ERROR, errors.GenerationFailed),
    (b"event: later\ndata: {}\n\nevent: done\ndata: {", errors.ProtocolError),
    (b"event: done\ndata: {\n\n", errors.ProtocolError),
]


def read_stream(transport: httpx.MockTransport, texts: list[str]) -> None:
    """Append the text of each token that arrives, by the blocking client."""
    with Client(transport=transport) as client, client.stream("hi") as stream:
        for token in stream:
            texts.append(token.text)  # noqa: PERF401 (an error must leave earlier texts)


async def read_stream_async(transport: httpx.MockTransport, texts: list[str]) -> None:
    """As `read_stream`, by the async client."""
    async with AsyncClient(transport=transport) as client, client.stream("hi") as stream:
        async for token in stream:
            texts.append(token.text)  # noqa: PERF401 (an error must leave earlier texts)


@pytest.mark.parametrize(("ending", "kind"), ENDINGS)
async def test_a_stream_that_fails_gives_its_tokens_and_then_an_error(
    ending: bytes, kind: type[CrmaClientError]
) -> None:
    """Also when the network delivers the tokens and the error in one piece."""
    transport = answering(content=TOKEN + TOKEN + ending)
    texts: list[str] = []
    with pytest.raises(kind, check=lambda error: error.status is None):
        read_stream(transport, texts)
    assert texts == ["a", "a"]
    texts_async: list[str] = []
    with pytest.raises(kind, check=lambda error: error.status is None):
        await read_stream_async(transport, texts_async)
    assert texts_async == ["a", "a"]


PAGE = "<html>a proxy's page</html>"
ANSWERS = [
    (429, json.dumps({"error": REFUSAL}), REFUSAL),
    (302, PAGE, {"code": None}),
    (503, PAGE, {"code": None}),
]


@pytest.mark.parametrize(("status", "answer", "expected"), ANSWERS)
def test_a_refusal_or_a_proxys_page_is_one_error_streamed_or_not(
    status: int, answer: str, expected: Any
) -> None:
    """`test_real_app.py` tests the refusals of the async client."""
    transport = answering(status, content=[answer.encode()], headers={"Retry-After": "2"})
    with Client(transport=transport) as client:
        with pytest.raises(errors.StatusError) as whole:
            client.generate("hi")
        with pytest.raises(errors.StatusError) as streamed, client.stream("hi"):
            pytest.fail("a refused stream was opened")
    for error in (whole.value, streamed.value):
        attributes = vars(error)
        assert attributes == attributes | {"status": status, "retry_after": 2} | expected


def test_an_answer_that_is_not_json_is_a_protocol_error() -> None:
    with (
        Client(transport=answering(text="not json")) as client,
        pytest.raises(errors.ProtocolError, match="not JSON"),
    ):
        client.adapters()


def test_a_server_that_is_not_ready_differs_from_one_that_answers_nonsense() -> None:
    with Client(transport=answering(503, json={})) as client:
        assert client.health() is False
        assert client.ready() is False
    with Client(transport=answering(404)) as client, pytest.raises(errors.NotFound):
        client.ready()


def breaks(error: Exception) -> Iterator[bytes]:
    yield TOKEN
    raise error


async def breaks_async(error: Exception) -> AsyncIterator[bytes]:
    yield TOKEN
    raise error


BROKEN = [
    (httpx.ReadTimeout(""), errors.TimedOut),
    (httpx.ConnectError("refused"), errors.ConnectionFailed),
    (httpx.RemoteProtocolError("closed"), errors.ConnectionFailed),
]


@pytest.mark.parametrize(("raised", "kind"), BROKEN)
async def test_a_broken_connection_is_an_error_of_this_package(
    raised: Exception, kind: type[CrmaClientError]
) -> None:
    def unreachable(_: httpx.Request) -> httpx.Response:
        raise raised

    transport = httpx.MockTransport(unreachable)
    with pytest.raises(kind), Client(retries=0, transport=transport) as client:
        client.generate("hi")
    with (
        Client(transport=answering(content=breaks(raised))) as client,
        client.stream("hi") as stream,
    ):
        assert next(iter(stream)).text == "a"
        with pytest.raises(kind):
            next(iter(stream))
    transport = answering(content=breaks_async(raised))
    with pytest.raises(kind):
        async with AsyncClient(retries=0, transport=transport) as awaited:
            await awaited.generate("hi")


def test_an_exception_of_the_callers_own_passes_through_the_stream_unchanged() -> None:
    """An httpx error that other code raises inside the block is not the server's."""
    with (
        pytest.raises(httpx.ConnectError),
        Client(transport=answering()) as client,
        client.stream("hi"),
    ):
        raise httpx.ConnectError("another service")


@pytest.mark.parametrize("base_url", ["", "localhost:8000", "ftp://host", "http://host:port", None])
def test_a_base_url_that_is_not_an_http_address_is_refused(base_url: Any) -> None:
    with (
        pytest.raises(errors.InvalidArgument, check=lambda error: error.field == "base_url"),
        Client(base_url) as client,
    ):
        client.health()


@pytest.mark.parametrize("key", ["sécret", "secret\n"])
def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(errors.InvalidArgument) as caught:
        Client(api_key=key)
    assert caught.value.field == "api_key"
    assert "cret" not in repr(caught.value)


def test_a_job_that_failed_says_why() -> None:
    """The reason is a text, and asking it for its message was an AttributeError."""
    failed = {"id": "abl-1", "status": "failed", "error": "the items were killed"}
    with (
        Client(transport=answering(json=failed)) as client,
        pytest.raises(errors.JobFailed, match="abl-1 is failed: the items were killed"),
    ):
        client.wait_for_ablation("abl-1")


def test_a_job_in_another_format_is_a_protocol_error() -> None:
    with Client(transport=answering(json={"state": "done"})) as client:
        with pytest.raises(errors.ProtocolError):
            client.wait_for_ablation("abl-1")
        with pytest.raises(errors.ProtocolError):
            client.run_ablation(question_set="public")
        with pytest.raises(errors.ProtocolError):
            client.detokenize([1])
