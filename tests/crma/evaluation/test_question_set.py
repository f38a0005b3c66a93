"""A question set is read whole, or refused with the line and field that are wrong."""

import json
import re
from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.evaluation import question_set
from crma.evaluation.question_set import inline_question_set, parse_question_set

GOOD: dict[str, Any] = {
    "id": "q1",
    "task": "medical",
    "question": "Cholera?",
    "answers": ["infectious diseases"],
}
DIGEST_OF_GOOD = "sha256:5706498c6d5b5dfdbff7d5dd02a501e683d58abecb474dbcabe35c768ef2454d"


def lines(*items: object) -> bytes:
    return "".join(json.dumps(item) + "\n" for item in items).encode()


def refusal(content: bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse_question_set("public", content)
    return caught.value


@pytest.mark.parametrize("escape", [False, True])
def test_what_was_written_is_read_and_has_one_digest(escape: bool) -> None:
    items = [
        GOOD,
        {
            "id": " 2 ",
            "task": "é",
            "question": "Qu\u2028\u0085e\n🦜?",
            "answers": ["-1", "\x00c", "日本"],
        },
    ]
    compact = "\n".join(
        json.dumps(item, ensure_ascii=escape, separators=(",", ":")) for item in items
    )
    turned = "\r\n\r\n".join(
        json.dumps(dict(reversed(item.items())), ensure_ascii=not escape) for item in items
    )
    first = parse_question_set("one", compact.encode())
    assert [
        question.model_dump(mode="json", exclude_defaults=True) for question in first.questions
    ] == items
    assert (
        parse_question_set("two", b"\xef\xbb\xbf" + turned.encode() + b"\r\n").digest
        == first.digest
    )
    assert inline_question_set(items, name="one") == first


def test_the_digest_of_a_known_set_does_not_change_and_every_field_and_the_order_count() -> None:
    changes = (
        {"id": "q2"},
        {"task": "legal"},
        {"question": "Cholera ?"},
        {"answers": ["infectious diseases", "ID"]},
    )
    others = [GOOD | change for change in changes]
    sets = [[GOOD], *([other] for other in others), [GOOD, others[0]], [others[0], GOOD]]
    digests = [inline_question_set(items).digest for items in sets]
    assert (digests[0], len(set(digests))) == (DIGEST_OF_GOOD, len(sets))


WRONG = [
    ({**GOOD, "hint": 3}, ".hint"),
    ({**GOOD, "question": " \n"}, ".question"),
    ({**GOOD, "answers": []}, ".answers"),
    ({**GOOD, "answers": ["a", "?!"]}, ".answers[1]"),
    ({**GOOD, "question": "half \ud800"}, ""),
    ({**GOOD, "answers": [{"a": [float("nan")]}]}, ".answers[0]"),
    ("text", ""),
    ({**GOOD, "choices": ["neoplasms", "injuries"]}, ""),  # the answer is not among them
    ({**GOOD, "choices": ["infectious diseases"] * 2}, ""),
]


@pytest.mark.parametrize(("bad", "field"), WRONG)
def test_a_wrong_item_is_refused_by_line_and_field_and_inline_by_index(
    bad: object, field: str
) -> None:
    error = refusal(lines({**GOOD, "id": "q0"}) + b"\n" + lines(bad))
    assert error.field == f"public line 3{field}"
    assert error.message.startswith(f"{error.field}: ")
    assert error.allowed
    json.dumps([error.message, error.value], ensure_ascii=False, allow_nan=False).encode()
    with pytest.raises(ConfigError, match=re.escape(f"questions[1]{field}")):
        inline_question_set([GOOD, bad])


@pytest.mark.parametrize(
    "broken", [b'{"id": ', b"[" * 100_000, b"1" * 5000, b"{} {}", b'{"id": "\xff"}']
)
def test_what_is_not_utf8_or_not_json_is_refused_by_line(broken: bytes) -> None:
    error = refusal(lines(GOOD) + broken)
    assert error.field == "public line 2"
    assert "Invalid JSON" in error.message
    assert len(str(error.value)) <= 80


def test_an_empty_set_and_one_question_too_many_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(question_set, "MAX_ITEMS", 2)
    items = [{**GOOD, "id": f"q{i}"} for i in range(3)]
    assert len(parse_question_set("public", lines(*items[:2])).questions) == 2
    for content, count in ((lines(*items), 3), (b"", 0), (b"\n \n", 0)):
        error = refusal(content)
        assert (error.field, error.value, error.allowed) == ("questions", count, "1 to 2")
