from __future__ import annotations

from itertools import pairwise

import pytest
from crma_client.sse import EventParser
from hypothesis import given, settings
from hypothesis import strategies as st

STREAM = (
    'event: token\r\ndata: {"text": "né 🦜"}\r\n\r\n: ping\n\n'
    "data:a\ndata: b\rdata\r\rid: 7\nevent: x\n\nevent: done\ndata: {}\n\n"
)
EVENTS = [("token", '{"text": "né 🦜"}'), ("message", "a\nb\n"), ("done", "{}")]


def parse(*chunks: bytes) -> list[tuple[str, str]]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_reads_every_line_ending_comments_and_joined_data_lines_wherever_it_is_cut() -> None:
    """A CR LF or a UTF-8 character cut in two must not add a blank line or a replacement character."""
    data = STREAM.encode()
    for cut in range(len(data) + 1):
        assert parse(data[:cut], b"", data[cut:]) == EVENTS, cut
    assert parse(*(bytes([byte]) for byte in data)) == EVENTS


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", "data: x", "data:", "event: token", ": c", "data: é\u2028"])),
    ending=st.sampled_from(["\n", "\r", "\r\n"]),
    cuts=st.lists(st.integers(0, 200), max_size=6),
)
def test_no_cut_changes_what_is_read(lines: list[str], ending: str, cuts: list[int]) -> None:
    data = "".join(line + ending for line in lines).encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    assert parse(*(data[a:b] for a, b in pairwise(edges))) == parse(data)
    assert parse(data) == parse("".join(line + "\n" for line in lines).encode()), "the three line endings are equal"


@pytest.mark.parametrize("unfinished", [b"data: x", b"data: x\n", b"event: done\ndata: {}\r"])
def test_an_unfinished_event_is_not_an_event(unfinished: bytes) -> None:
    assert parse(unfinished) == []


def test_invalid_utf8_becomes_a_replacement_character() -> None:
    assert parse(b"data: \xff\n\n") == [("message", "\ufffd")]
