from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from crma_client import CrmaClientError, Question, calls
from crma_client.errors import InvalidArgument, ProtocolError
from crma_client.types import AblationReport, AdapterListing, read, read_generation
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import COMPARISON, DIGEST, SCORE, TASK, events, generation


def test_only_what_was_given_is_sent() -> None:
    """None means "the server decides", also for crma, whose default is not False."""
    call = calls.generate("hi", {"task": "medical", "crma": None, "max_tokens": None, "temperature": 0, "stop": "."})
    assert (call.method, call.path) == ("POST", "/generate")
    assert call.body == {"prompt": "hi", "task": "medical", "temperature": 0, "stop": "."}
    assert calls.stream("hi", {"crma": False}).body == {"prompt": "hi", "crma": False, "stream": True}


def test_questions_are_sent_as_the_contract_writes_them() -> None:
    body = calls.ablation({"questions": [Question("q1", "medical", "?", ("a", "b"))], "margin": 0.02}).body
    assert json.loads(json.dumps(body)) == {
        "questions": [{"id": "q1", "task": "medical", "question": "?", "answers": ["a", "b"]}],
        "margin": 0.02,
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", b"bytes"),
        ("prompt", "\ud800"),
        ("crma", "on"),
        ("crma", 1),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", float("nan")),
        ("temperature", "0"),
        ("stop", [1]),
        ("max_token", 4),
        ("stream", True),
    ],
)
def test_an_argument_no_server_would_accept_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        calls.generate(**{"prompt": "hi", "options": {field: value}})
    assert (caught.value.field, caught.value.allowed is not None) == (field, True)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "hi"},
        {"questions": [{"id": "q1"}]},
        {"questions": [Question("q1", "medical", "?", (1,))]},
        {"variants": "task"},
        {"margin": "0"},
    ],
)
def test_an_ablation_argument_no_server_would_accept_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        calls.ablation(options)


def test_a_stream_assembles_the_same_answer_as_one_body() -> None:
    for n in (1, 3):
        body = {"prompt": "one two", "n": n}
        reader = calls.TokenReader()
        for name, data in events(body):
            list(reader.feed(f"event: {name}\ndata: {json.dumps(data)}\n\n".encode()))
        reader.close()
        whole = read_generation(generation(body))
        assert [c.text for c in reader.result.choices] == [c.text.replace(" ", "") for c in whole.choices]
        assert (reader.result.usage, reader.result.finish_reason) == (whole.usage, "stop")
    assert reader.result.choices[2].logprobs == (-1.0,), "the done event's own log-probabilities win"


def test_a_stream_without_done_has_no_result() -> None:
    reader = calls.TokenReader()
    assert len(list(reader.feed(b'event: token\ndata: {"index": 0, "text": "a"}\n\n'))) == 1
    with pytest.raises(ProtocolError):
        reader.result  # noqa: B018
    with pytest.raises(ProtocolError):
        reader.close()


REPORT = {
    "id": "abl-1",
    "question_set": {"name": "public", "digest": DIGEST, "items": 1},
    "scorer": "exact",
    "variants": {"task": {**SCORE, "by_task": {}}},
    "comparisons": [COMPARISON],
    "items": [{"id": "q1", "task": "medical", "answers": ["x"], "outputs": {}}],
    "provenance": {},
    "wall_s": 1,
}
ANSWERS = [
    (read_generation, generation({"prompt": "p", "n": 2})),
    (partial(read, AblationReport), REPORT),
    (
        partial(read, AdapterListing),
        {"base": {}, "backbone": {"version": "v1", "digest": "d", "certificate": {}}, "tasks": [TASK]},
    ),
]


@settings(derandomize=True, max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_answer_is_an_error_of_the_tree_or_is_read(data: st.DataObject) -> None:
    """One value anywhere in an answer replaced by other JSON: never a TypeError or KeyError out of the client."""
    reader, answer = data.draw(st.sampled_from(ANSWERS))
    damaged = json.loads(json.dumps(answer))
    place: Any = damaged
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], dict | list) and place[key]) or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(st.sampled_from([None, True, 1, "x", [], {}, [None], [1, 2], {"index": []}]))
    try:
        result = reader(damaged)
    except CrmaClientError:
        return
    assert result.raw == damaged
