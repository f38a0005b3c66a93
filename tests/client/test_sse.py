"""The parser of server-sent events, with every line ending and every way to split a stream."""

import json
from contextlib import suppress
from itertools import pairwise
from typing import Any

import httpx
import pytest
from crma_client.chats import ChatReader
from crma_client.errors import CrmaClientError
from crma_client.sse import EventParser
from crma_client.streams import TokenReader, TokenStream
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values

STREAM = (
    'event: token\r\ndata: {"text": "né\u2028🦜"}\r\n\r\n: ping\n\n'
    "data:a\ndata: b\rdata\r\rid: 7\nevent: x\n\nevent: done\ndata: {}\n\n"
)
EVENTS = [("token", '{"text": "né\u2028🦜"}'), ("message", "a\nb\n"), ("done", "{}")]


def parse(*chunks: bytes) -> list[tuple[str, str]]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_a_stream_gives_the_same_events_wherever_it_is_split() -> None:
    """A split CR LF adds no blank line, and a split UTF-8 character no replacement character."""
    data = STREAM.encode()
    for cut in range(len(data) + 1):
        assert parse(data[:cut], b"", data[cut:]) == EVENTS, cut
    assert parse(*(bytes([byte]) for byte in data)) == EVENTS


@pytest.mark.parametrize("unfinished", [b"data: x", b"data: x\n", b"event: done\ndata: {}\r"])
def test_an_unfinished_event_is_dropped(unfinished: bytes) -> None:
    assert parse(unfinished) == []


def test_invalid_utf8_becomes_a_replacement_character() -> None:
    assert parse(b"data: \xff\n\n") == [("message", "\ufffd")]


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """The bytes in pieces."""
    places = [0, *sorted(place % (len(data) + 1) for place in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(places)]


pieces = st.sampled_from(
    [
        b"data",
        b":",
        b" ",
        b"\n",
        b"\r",
        b"\r\n",
        b"event",
        b"id",
        b"retry",
        b"\xef\xbb\xbf",
        b"\xf0",
    ]
)
streams = st.lists(pieces | st.binary(max_size=6), max_size=20).map(b"".join)
cut_places = st.lists(st.integers(0, 10**6), max_size=12)
# Lines that an event can carry: a newline ends one, and the first space after the colon is dropped.
lines = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0"), max_size=20)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(streams, cut_places)
def test_any_bytes_give_the_same_events_wherever_they_are_split(
    data: bytes, cuts: list[int]
) -> None:
    assert parse(*cut(data, cuts)) == parse(data)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(lines.filter(bool), st.lists(lines, min_size=1, max_size=3)), max_size=5),
    st.sampled_from(["\n", "\r", "\r\n"]),
    cut_places,
)
def test_events_come_back_as_they_were_sent(
    events: list[tuple[str, list[str]]], newline: str, cuts: list[int]
) -> None:
    written = ""
    for name, data in events:
        sent = [f"event: {name}", *(f"data: {line}" for line in data), ": a comment", "", ""]
        written += newline.join(sent)
    written += ":"  # a CR at the end of a chunk waits for what comes after it
    expected = [(name, "\n".join(data)) for name, data in events]
    assert parse(*cut(written.encode(), cuts)) == expected


def test_a_long_line_takes_time_in_proportion_to_its_length() -> None:
    """A piece of a line was joined to all that came before, for every piece again."""
    parser = EventParser()
    for _ in range(50_000):
        assert list(parser.feed(b"data: " + b"x" * 100)) == []
    assert list(parser.feed(b"\n\n"))


GOOD = {"id": "1", "finish_reason": "stop", "task": None, "crma": True, "usage": {}}
GOOD |= {"timings": {}, "provenance": {}}
answers = st.fixed_dictionaries(
    {name: st.just(value) | st.just(value) | json_values() for name, value in GOOD.items()},
    optional={name: json_values() for name in ("choices", "error", "index", "text", "logprob")},
)
details = st.fixed_dictionaries(
    {"message": st.sampled_from(["", "no", 3, [], ["x"], {}, {"a": 1}, None])},
    optional={"allowed": json_values()},
)
errors = st.fixed_dictionaries({"error": details})
datas = (answers | errors | json_values()).map(json.dumps) | st.text(max_size=10)
known = st.sampled_from(["token", "done", "error", "message"])


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists(st.tuples(known, datas), max_size=4), cut_places)
def test_a_stream_of_any_events_is_read_or_ends_with_an_error_of_ours(
    events: list[tuple[str, str]], cuts: list[int]
) -> None:
    written = "".join(f"event: {name}\ndata: {data}\n\n" for name, data in events)
    content = cut(written.encode("utf-8", "replace"), cuts)
    stream = TokenStream(httpx.Response(200, content=iter(content)), TokenReader())
    refused = None
    try:
        texts = [token.text for token in stream]
        assert all(isinstance(text, str) for text in texts)
        assert stream.result.choices
    except CrmaClientError as error:
        refused = error
    assert isinstance(str(refused), str)


deltas = st.fixed_dictionaries(
    {"content": st.sampled_from(["a", "", None, 1])},
    optional={"tool_calls": st.lists(json_values(), max_size=2) | json_values()},
)
chat_choices = st.fixed_dictionaries(
    {"index": st.just(0) | json_values(), "delta": deltas | json_values()},
    optional={name: json_values() for name in ("finish_reason", "logprobs")},
)
chunks = st.fixed_dictionaries(
    {"id": st.just("1") | json_values(), "choices": st.lists(chat_choices) | json_values()},
    optional={name: json_values() for name in ("usage", "provenance", "error")},
)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.lists((chunks | json_values()).map(json.dumps), max_size=4), cut_places)
def test_a_chat_of_any_chunks_is_read_or_ends_with_an_error_of_ours(
    sent: list[str], cuts: list[int]
) -> None:
    written = "".join(f"data: {data}\n\n" for data in [*sent, "[DONE]"])
    content = cut(written.encode(), cuts)
    stream = TokenStream(httpx.Response(200, content=iter(content)), ChatReader())
    with suppress(CrmaClientError):
        assert all(isinstance(token.text, str) for token in stream)
        assert isinstance(stream.result.text, str)


def test_data_that_is_nested_too_deep_is_no_answer() -> None:
    event: Any = b'event: token\ndata: {"text": ' + b"[" * 100_000 + b"\n\n"
    with pytest.raises(CrmaClientError):
        list(TokenStream(httpx.Response(200, content=event), TokenReader()))
