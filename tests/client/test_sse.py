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


def test_reads_every_line_ending_comments_and_joined_data_lines_wherever_it_is_cut() -> None:
    """A CR LF or a UTF-8 character cut in two must not add a blank line or a replacement character."""
    data = STREAM.encode()
    for cut in range(len(data) + 1):
        assert parse(data[:cut], b"", data[cut:]) == EVENTS, cut
    assert parse(*(bytes([byte]) for byte in data)) == EVENTS


@pytest.mark.parametrize("unfinished", [b"data: x", b"data: x\n", b"event: done\ndata: {}\r"])
def test_an_unfinished_event_is_not_an_event(unfinished: bytes) -> None:
    assert parse(unfinished) == []


def test_invalid_utf8_becomes_a_replacement_character() -> None:
    assert parse(b"data: \xff\n\n") == [("message", "\ufffd")]
