"""The parser of server-sent events, with every line ending and every way to split a stream."""

import pytest
from crma_client.sse import EventParser

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
