"""crma.evaluation.question_set: a set is read whole, or refused with the faulty line and field."""

import json
import re
import subprocess
import sys
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
def test_the_layout_of_the_file_does_not_change_what_is_read_nor_the_digest(escape: bool) -> None:
    unusual = {
        "id": " 2 ",
        "task": "é",
        "question": "Qu\u2028\u0085e\n🦜?",
        "answers": ["-1", "\x00c", "日本"],
    }
    items = [GOOD, unusual]
    compact = [json.dumps(item, ensure_ascii=escape, separators=(",", ":")) for item in items]
    reordered = [dict(reversed(item.items())) for item in items]
    spaced = [json.dumps(item, ensure_ascii=not escape) for item in reordered]
    byte_order_mark = b"\xef\xbb\xbf"
    first = parse_question_set("one", "\n".join(compact).encode())
    second = parse_question_set("two", byte_order_mark + "\r\n\r\n".join(spaced).encode() + b"\r\n")
    read = [each.model_dump(mode="json", exclude_defaults=True) for each in first.questions]
    assert read == items
    assert second.digest == first.digest
    assert inline_question_set(items, name="one") == first


def test_the_digest_is_pinned_and_depends_on_every_field_and_on_the_order() -> None:
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


WRONG: list[tuple[object, str]] = [
    ({**GOOD, "hint": 3}, ".hint"),
    ({**GOOD, "question": " \n"}, ".question"),
    ({**GOOD, "answers": []}, ".answers"),
    ({**GOOD, "answers": ["a", "?!"]}, ".answers[1]"),
    ({**GOOD, "answers": ["a", "\ufdfa" * 556]}, ".answers[1]"),  # 18 characters each, unified
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
def test_a_line_that_is_not_utf8_or_not_json_is_refused_by_its_number(broken: bytes) -> None:
    error = refusal(lines(GOOD) + broken)
    assert error.field == "public line 2"
    assert "Invalid JSON" in error.message
    assert len(str(error.value)) <= 80


def test_an_empty_set_and_one_with_too_many_questions_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(question_set, "MAX_ITEMS", 2)
    items = [{**GOOD, "id": f"q{i}"} for i in range(3)]
    assert len(parse_question_set("public", lines(*items[:2])).questions) == 2
    for content, count in ((lines(*items), 3), (b"", 0), (b"\n \n", 0)):
        error = refusal(content)
        assert (error.field, error.value, error.allowed) == ("questions", count, "1 to 2")


def test_reading_a_question_set_imports_neither_torch_nor_transformers() -> None:
    heavy = ("torch", "transformers", "numpy", "scipy", "safetensors")
    code = (
        "import sys; from crma.evaluation.question_set import inline_question_set;"
        f"print(inline_question_set([{GOOD}]).digest, [n for n in {heavy} if n in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [DIGEST_OF_GOOD, "[]"]
