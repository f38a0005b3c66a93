"""A question set is read whole, or refused with the line and field that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crma.errors import ConfigError
from crma.question_set import inline_question_set, parse_question_set, read_question_set
from crma.scorers import normalise

GOOD: dict[str, Any] = {"id": "q1", "task": "medical", "question": "Cholera?", "answers": ["infectious diseases"]}

DIGEST_OF_GOOD = "sha256:5706498c6d5b5dfdbff7d5dd02a501e683d58abecb474dbcabe35c768ef2454d"

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.strip)
ITEMS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXT,
            "task": TEXT,
            "question": TEXT,
            "answers": st.lists(TEXT.filter(normalise), min_size=1, max_size=3),
        }
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda item: item["id"],
)


def lines(*items: object) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def refusal(content: bytes, **limits: int) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_question_set("public", content, **limits)
    return caught.value


@settings(derandomize=True, max_examples=60, deadline=None)
@given(ITEMS, st.booleans())
def test_what_was_written_is_read_and_has_one_digest(items: list[dict[str, Any]], escape: bool) -> None:
    compact = "\n".join(json.dumps(item, ensure_ascii=escape, separators=(",", ":")) for item in items)
    turned = (
        "\r\n\r\n".join(json.dumps(dict(reversed(item.items())), ensure_ascii=not escape) for item in items) + "\r\n"
    )
    first = parse_question_set("one", compact.encode())
    assert [{**vars(question), "answers": list(question.answers)} for question in first.questions] == items
    assert parse_question_set("two", b"\xef\xbb\xbf" + turned.encode()).digest == first.digest
    assert inline_question_set(items).questions == first.questions
    assert inline_question_set(items).digest == first.digest


def test_digest_of_a_known_set_does_not_change() -> None:
    assert parse_question_set("public", lines(GOOD)).digest == DIGEST_OF_GOOD


@pytest.mark.parametrize(
    "change", [{"id": "q2"}, {"task": "legal"}, {"question": "Cholera ?"}, {"answers": ["infectious diseases", "ID"]}]
)
def test_digest_changes_with_every_field(change: dict[str, Any]) -> None:
    assert inline_question_set([{**GOOD, **change}]).digest != inline_question_set([GOOD]).digest


def test_digest_depends_on_the_order_of_questions() -> None:
    other = {**GOOD, "id": "q2"}
    assert inline_question_set([GOOD, other]).digest != inline_question_set([other, GOOD]).digest


@settings(derandomize=True, max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=80), st.binary(max_size=40).map(lambda noise: lines(GOOD)[:-5] + noise)))
def test_no_bytes_crash_the_parser(content: bytes) -> None:
    try:
        parse_question_set("noise", content)
    except ConfigError as error:
        error.message.encode()
        json.dumps([error.field, error.value, error.allowed], ensure_ascii=False).encode()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from([*GOOD, "hint"]), JSON, max_size=5), st.booleans())
def test_no_json_crashes_the_parser(item: dict[str, Any], complete: bool) -> None:
    whole = {**GOOD, **item} if complete else item
    try:
        inline_question_set([whole])
    except ConfigError as error:
        error.message.encode()
        json.dumps([error.field, error.value, error.allowed], ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize(
    ("bad", "field", "value"),
    [
        ({**GOOD, "hint": 3}, "line 2: hint", "3"),
        ({key: GOOD[key] for key in ("id", "task", "answers")}, "line 2: question", "None"),
        ({**GOOD, "id": 7}, "line 2: id", "7"),
        ({**GOOD, "task": None}, "line 2: task", "None"),
        ({**GOOD, "question": " \n"}, "line 2: question", " \n"),
        ({**GOOD, "answers": []}, "line 2: answers", "[]"),
        ({**GOOD, "answers": "infectious diseases"}, "line 2: answers", "infectious diseases"),
        ({**GOOD, "answers": ["a", ""]}, "line 2: answers[1]", ""),
        ({**GOOD, "answers": ["a", 1]}, "line 2: answers[1]", "1"),
        ({**GOOD, "answers": ["?!"]}, "line 2: answers[0]", "?!"),
        ({**GOOD, "question": "half \ud800"}, "line 2: question", "half \\ud800"),
        ([GOOD], "line 2", None),
        ("text", "line 2", "text"),
    ],
)
def test_a_wrong_item_is_refused_by_line_and_field(bad: object, field: str, value: str | None) -> None:
    error = refusal(lines({**GOOD, "id": "q0"}, bad))
    assert error.field == field
    assert error.message.startswith(field)
    assert error.allowed
    assert value is None or error.value == value


def test_a_duplicate_id_names_both_lines() -> None:
    error = refusal(lines(GOOD, {**GOOD, "id": "q2"}) + b"\n" + lines(GOOD))
    assert (error.field, error.value) == ("line 4: id", "q1")
    assert "line 1" in error.message


def test_a_key_given_twice_is_refused_and_not_the_last_one_taken() -> None:
    error = refusal(b'{"id": "q1", "id": "q2", "task": "t", "question": "?a", "answers": ["a"]}')
    assert (error.field, error.value) == ("line 1: id", "q2")


@pytest.mark.parametrize(
    "broken", [b'{"id": ', b"q1, medical", b"[" * 100_000, b"1" * 5000, b'{"id": "\x01"}', b"{} {}"]
)
def test_what_is_not_json_is_refused_by_line(broken: bytes) -> None:
    error = refusal(lines(GOOD) + broken)
    assert error.field == "line 2"
    assert error.allowed == "one JSON object"
    assert len(str(error.value)) <= 81


def test_what_is_not_utf8_is_refused_by_line_and_byte() -> None:
    error = refusal(lines(GOOD) + b'{"id": "\xff"}')
    assert (error.field, error.value, error.allowed) == ("line 2", "byte 9 is 0xff", "UTF-8")


def test_deep_nesting_in_a_field_is_refused_and_not_a_crash() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ConfigError) as caught:
        inline_question_set([{**GOOD, "question": deep}])
    assert caught.value.field == "questions[0].question"
    while deep:  # freed level by level
        deep = deep.pop()


def test_the_limit_of_items_is_the_callers() -> None:
    items = [{**GOOD, "id": f"q{i}"} for i in range(3)]
    assert len(parse_question_set("public", lines(*items), max_items=3).questions) == 3
    error = refusal(lines(*items), max_items=2)
    assert (error.field, error.value, error.allowed) == ("line 3", "3", "at most 2 questions")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_set_is_refused(content: bytes) -> None:
    assert refusal(content).field == "questions"


def test_inline_questions_are_refused_by_index() -> None:
    with pytest.raises(ConfigError) as caught:
        inline_question_set([GOOD, {**GOOD, "id": "q2", "answers": [""]}])
    assert caught.value.field == "questions[1].answers[0]"


def test_a_file_gives_its_name_to_the_set(tmp_path: Path) -> None:
    path = tmp_path / "public.jsonl"
    path.write_bytes(lines(GOOD))
    found = read_question_set(path)
    assert found.describe() == {"name": "public", "digest": DIGEST_OF_GOOD, "items": 1}


def test_a_file_that_is_not_there_is_refused_by_its_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_question_set(tmp_path / "none.jsonl")
    assert caught.value.value == str(tmp_path / "none.jsonl")


def test_questions_of_some_tasks_are_a_set_of_their_own() -> None:
    legal = {**GOOD, "id": "q2", "task": "legal"}
    whole = inline_question_set([GOOD, legal], name="public")
    assert whole.for_tasks(["legal"]).questions == whole.questions[1:]
    assert whole.for_tasks(["legal"]).digest == inline_question_set([legal]).digest
    assert whole.for_tasks(["legal", "medical"]) == whole


@pytest.mark.parametrize(("tasks", "value"), [(["medical", "law"], "law"), ([], [])])
def test_a_task_without_questions_is_refused(tasks: list[str], value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        inline_question_set([GOOD]).for_tasks(tasks)
    assert (caught.value.field, caught.value.value, caught.value.allowed) == ("tasks", value, ["medical"])
