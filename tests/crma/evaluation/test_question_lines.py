"""A question set that arrives in pieces is the one that is read at once, or is refused alike."""

import json
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values

from crma.core.errors import ConfigError
from crma.evaluation.question_lines import QuestionLines
from crma.evaluation.question_set import Question, parse_question_set

texts = st.text(max_size=12)
good_questions = st.fixed_dictionaries(
    {
        "id": st.integers(0, 30).map(str),
        "task": st.sampled_from(["medical", "legal"]),
        "question": texts.map("q{}".format),
        "answers": st.lists(texts.map("a{}".format), min_size=1, max_size=3),
    }
)
any_questions = st.fixed_dictionaries(
    {},
    optional={
        name: json_values() | st.text(max_size=5)
        for name in ("id", "task", "question", "answers", "choices", "surprise")
    },
)
lines = st.one_of(
    good_questions.map(json.dumps).map(str.encode),
    good_questions.map(lambda each: json.dumps(each, ensure_ascii=False).encode()),
    (any_questions | json_values()).map(json.dumps).map(str.encode),
    st.sampled_from([b"", b" ", b"\r", b"\xef\xbb\xbf", b"{", b"\xff", b"[" * 5000]),
    st.binary(max_size=10),
)
contents = st.lists(lines, max_size=8).map(b"\n".join)
good_contents = st.lists(good_questions, min_size=1, max_size=8, unique_by=lambda each: each["id"])
cut_places = st.lists(st.integers(0, 10**6), max_size=10)


def read_in_pieces(content: bytes, cuts: list[int]) -> tuple[list[Question], str]:
    places = [0, *sorted(place % (len(content) + 1) for place in cuts), len(content)]
    arriving = QuestionLines("public")
    questions = []
    for start, end in pairwise(places):
        questions += arriving.read(content[start:end])
    last, digest = arriving.end()
    return [*questions, *last], digest


def refusal(read: Any) -> tuple[str | None, str] | None:
    """Field and message with which a set is refused; None if it is not."""
    try:
        read()
    except ConfigError as error:
        return error.field, error.message
    return None


@settings(derandomize=True, max_examples=150, deadline=None)
@given(contents, cut_places)
def test_any_lines_are_read_or_refused_alike_however_they_arrive(
    content: bytes, cuts: list[int]
) -> None:
    at_once = refusal(lambda: parse_question_set("public", content))
    assert refusal(lambda: read_in_pieces(content, cuts)) == at_once
    assert len(str(at_once)) < 5000
    if at_once is None:
        read = parse_question_set("public", content)
        assert read_in_pieces(content, cuts) == (list(read.questions), read.digest)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(good_contents)
def test_good_questions_come_back_as_they_were_written(items: list[dict[str, Any]]) -> None:
    content = "".join(json.dumps(item) + "\n" for item in items).encode()
    read = parse_question_set("public", content)
    assert [each.model_dump(mode="json", exclude_defaults=True) for each in read.questions] == items
    written = b"\n".join(each.model_dump_json().encode() for each in read.questions)
    assert parse_question_set("public", written) == read


def test_a_long_line_in_many_pieces_takes_linear_time() -> None:
    """Each piece was joined to all before it: 300 GB copied for a line of 2**20 bytes."""
    question = {"id": "0", "task": "medical", "question": "q" * (2**20 - 90), "answers": ["a"]}
    content = json.dumps(question).encode()
    arriving = QuestionLines("public")
    for place in range(0, len(content), 2):
        assert arriving.read(content[place : place + 2]) == []
    assert len(arriving.end()[0]) == 1
