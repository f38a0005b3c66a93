"""What is sent, and what becomes of what the real server does not answer at will; the rest is in test_real_app."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from crma_client import AsyncClient, Client, CrmaClientError, errors
from crma_client.calls import write_body

TOKEN = b'event: token\ndata: {"index": 0, "text": "a"}\n\n'
SAID = {
    "code": "queue_full",
    "message": "full",
    "field": "task",
    "value": "x",
    "allowed": ["medical"],
}


def answering(status: int = 200, **answer: Any) -> httpx.MockTransport:
    """A server, for either client, that gives one answer to everything."""
    return httpx.MockTransport(lambda _: httpx.Response(status, **answer))


def test_only_what_was_given_is_sent_and_only_what_json_has() -> None:
    """None means "the server decides", also for crma, whose default is not False."""
    fields = {"task": "medical", "crma": None, "raw": False, "temperature": 0, "stop": ("a", "b")}
    assert json.loads(write_body(fields)) == {
        "task": "medical",
        "raw": False,
        "temperature": 0,
        "stop": ["a", "b"],
    }
    for value in (b"x", {1}):
        with pytest.raises(errors.InvalidArgument, check=lambda error: error.field == "body"):
            write_body({"task": value})


ENDINGS = [
    (
        b'event: error\ndata: {"error": {"message": "late", "code": "deadline"}}\n\n',
        errors.GenerationFailed,
    ),
    (b"event: later\ndata: {}\n\nevent: done\ndata: {", errors.ProtocolError),
    (b"event: done\ndata: {\n\n", errors.ProtocolError),
]


@pytest.mark.parametrize(("ending", "kind"), ENDINGS)
async def test_a_stream_that_fails_gives_its_tokens_and_then_an_error(
    ending: bytes, kind: type[Exception]
) -> None:
    """Also when the network delivers the tokens and the error in one piece."""
    transport, seen = answering(content=TOKEN + TOKEN + ending), []
    with (
        pytest.raises(kind) as caught,
        Client(transport=transport) as client,
        client.stream("hi") as stream,
    ):
        seen.extend(token.text for token in stream)
    assert (seen, caught.value.status) == (["a", "a"], None)
    with pytest.raises(kind):
        async with AsyncClient(transport=transport) as awaited, awaited.stream("hi") as astream:
            seen.extend([token.text async for token in astream])


PAGE = "<html>a proxy's page</html>"
ANSWERS = [
    (429, json.dumps({"error": SAID}), SAID),
    (302, PAGE, {"code": None}),
    (503, PAGE, {"code": None}),
]


@pytest.mark.parametrize(("status", "answer", "said"), ANSWERS)
def test_a_refusal_or_a_proxys_page_is_one_error_streamed_or_not(
    status: int, answer: str, said: Any
) -> None:
    """As the asynchronous client's are, which test_real_app has."""
    transport = answering(status, content=[answer.encode()], headers={"Retry-After": "2"})
    with Client(transport=transport) as client:
        with pytest.raises(errors.StatusError) as whole:
            client.generate("hi")
        with pytest.raises(errors.StatusError) as streamed, client.stream("hi"):
            pytest.fail("a refused stream was opened")
    for error in (whole.value, streamed.value):
        assert vars(error) == vars(error) | {"status": status, "retry_after": 2} | said


def test_an_answer_that_is_not_json_is_an_error_of_the_tree() -> None:
    with (
        Client(transport=answering(text="not json")) as client,
        pytest.raises(errors.ProtocolError, match="not JSON"),
    ):
        client.adapters()


def test_a_server_that_is_not_ready_is_told_from_one_that_answers_nonsense() -> None:
    with Client(transport=answering(503, json={})) as client:
        assert (client.health(), client.ready()) == (False, False)
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
]
BROKEN += [(httpx.RemoteProtocolError("closed"), errors.ConnectionFailed)]


@pytest.mark.parametrize(("raised", "kind"), BROKEN)
async def test_a_broken_connection_is_an_error_of_the_tree(
    raised: Exception, kind: type[CrmaClientError]
) -> None:
    def unreachable(_: httpx.Request) -> httpx.Response:
        raise raised

    with pytest.raises(kind), Client(transport=httpx.MockTransport(unreachable)) as client:
        client.generate("hi")
    with (
        Client(transport=answering(content=breaks(raised))) as client,
        client.stream("hi") as stream,
    ):
        assert next(iter(stream)).text == "a"
        with pytest.raises(kind):
            next(iter(stream))
    with pytest.raises(kind):
        async with AsyncClient(transport=answering(content=breaks_async(raised))) as awaited:
            await awaited.generate("hi")


def test_an_exception_of_the_callers_own_leaves_the_stream_unchanged() -> None:
    """An httpx error raised inside the block by other code is not the server's."""
    with (
        pytest.raises(httpx.ConnectError),
        Client(transport=answering()) as client,
        client.stream("hi"),
    ):
        raise httpx.ConnectError("another service")


@pytest.mark.parametrize("base_url", ["", "localhost:8000", "ftp://host", "http://host:port", None])
def test_a_base_url_that_is_none_is_refused(base_url: Any) -> None:
    with (
        pytest.raises(errors.InvalidArgument, check=lambda e: e.field == "base_url"),
        Client(base_url) as client,
    ):
        client.health()


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown() -> None:
    for key in ("sécret", "secret\n"):
        with pytest.raises(errors.InvalidArgument) as caught:
            Client(api_key=key)
        assert (caught.value.field, "cret" in repr(caught.value)) == ("api_key", False)
