"""Splits depend on the questions alone, share none, and match their digests; users' own files."""

import json
import random
from functools import partial
from pathlib import Path

import pytest
from paths import STORE

from crma.core.errors import DataError
from crma.data import splits as data
from crma.data.examples import Example, read_jsonl
from crma.data.sources import DOMAINS, read_domain, words
from crma.data.splits import build, load_split, split, split_path

PAIRS = [
    (f'Which state or territory has the court "Court {i}"?', f"state {i % 7}") for i in range(800)
]
PUBLIC_SET = STORE / "question_sets" / "public.jsonl"


def questions(files: dict[str, bytes]) -> list[str]:
    """Every question in the files of a domain."""
    lines = [json.loads(line) for content in files.values() for line in content.splitlines()]
    return [line.get("prompt") or line["question"] for line in lines]


def test_splits_do_not_depend_on_order_or_repetition_in_the_source() -> None:
    shuffled = [*PAIRS, *PAIRS[:50]]
    random.Random(0).shuffle(shuffled)
    assert split("legal", shuffled) == split("legal", PAIRS)


def test_splits_share_no_question_not_even_in_another_case_or_punctuation() -> None:
    variants = [(question.upper().replace('"', "'"), answer) for question, answer in PAIRS]
    files = split("legal", [*PAIRS, *variants])
    sizes = {name: content.count(b"\n") for name, content in files.items()}
    assert sizes == {
        "train.jsonl": 500,
        "validation.jsonl": 100,
        "holdout.jsonl": 100,
        "public.jsonl": 20,
    }
    assert len({" ".join(words(question)) for question in questions(files)}) == 720


def test_a_question_with_two_answers_is_left_out_and_too_few_questions_are_refused() -> None:
    contradictions = [(question.lower(), "another state") for question, _ in PAIRS[:80]]
    kept = {question.lower() for question in questions(split("legal", [*PAIRS, *contradictions]))}
    assert len(kept) == 720
    assert not kept & {question for question, _ in contradictions}
    with pytest.raises(DataError, match="too few", check=lambda error: error.value == 719):
        split("legal", [*PAIRS[:-1], *contradictions])


@pytest.fixture
def courts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small source of the legal domain, for which digests are committed."""
    path = tmp_path / "courts.json"
    places = ["Ohio", "Iowa", "Guam"]
    found = [{"name": f"Court {i}", "location": places[i % 3]} for i in range(800)]
    path.write_text(json.dumps(found))
    digests = data.digests("legal", split("legal", read_domain("legal", path)))
    monkeypatch.setattr(data, "committed_digests", lambda: digests)
    monkeypatch.setenv("CRMA_HOME", str(tmp_path))
    return path


def test_a_domain_is_built_once_and_a_changed_source_is_refused(
    tmp_path: Path, courts: Path
) -> None:
    notes: list[str] = []
    build_legal = partial(build, ["legal"], sources={"legal": courts}, note=notes.append)
    assert build_legal() == build_legal() == data.committed_digests()
    assert notes[2:] == [f"legal: already built in {tmp_path / 'data' / 'legal'}"]
    answers = {example.completion for example in load_split("legal", "train")}
    assert answers == {"ohio", "iowa", "guam"}
    path = split_path("legal", "train")
    damaged = path.read_bytes().replace(b"ohio", b"iowa", 1)
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=r"Build it again with `crma data legal`"):
        load_split("legal", "train")
    courts.write_text(courts.read_text().replace("Ohio", "Utah"))
    with pytest.raises(DataError, match="source has changed") as caught:
        build_legal()
    assert caught.value.allowed in data.committed_digests().values()
    assert path.read_bytes() == damaged
    courts.write_text(courts.read_text().replace("Utah", "Ohio"))
    build_legal()  # replaces the damaged folder
    assert len(load_split("legal", "train")) == 500


def test_the_committed_public_set_has_the_committed_digests() -> None:
    files = ("train", "validation", "holdout", "public")
    names = {f"{domain}/{name}" for domain in DOMAINS for name in files}
    assert set(data.committed_digests()) == names
    lines = PUBLIC_SET.read_bytes().splitlines(keepends=True)
    assert len(lines) == 100
    for i, domain in enumerate(DOMAINS[:5]):  # language came later; it has no shipped adapter
        part = b"".join(lines[20 * i : 20 * (i + 1)])
        assert data.bytes_digest(part) == data.committed_digests()[f"{domain}/public"]


USER = {"role": "user", "content": "Q\u2028"}
ASSISTANT = {"role": "assistant", "content": "A"}


def test_a_users_own_folder_is_a_task_in_any_of_trls_conventions(tmp_path: Path) -> None:
    plain = {"prompt": "Q\u2028", "completion": "A", "id": 7}
    lines = [plain, {"prompt": [USER], "completion": [ASSISTANT]}, {"messages": [USER, ASSISTANT]}]
    text = "\n" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n"
    (tmp_path / "train.jsonl").write_text(text)
    assert load_split(str(tmp_path), "train") == [Example("Q\u2028", "A")] * 3
    with pytest.raises(DataError, match=r"has no validation\.jsonl, holdout\.jsonl: a task needs"):
        load_split(str(tmp_path), "holdout")
    with pytest.raises(DataError, match="neither a built-in domain nor a folder that exists"):
        load_split(str(tmp_path / "typo"), "holdout")


BAD_LINES = [
    ('{"prompt": "Q"}', ".completion: Field required"),
    (
        json.dumps({"messages": [USER, ASSISTANT, USER, ASSISTANT]}),
        ": Expected one message of the user and one",
    ),
    (
        json.dumps({"prompt": [USER, USER], "completion": [ASSISTANT]}),
        ": Expected one message of the user and one",
    ),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Q", "completion": "A"}\n\n' + line + "\n")
    with pytest.raises(
        DataError, check=lambda error: error.message.startswith(f"train.jsonl line 3{message}")
    ):
        read_jsonl(path)
    path.write_text("\n")
    with pytest.raises(DataError, match="no examples"):
        read_jsonl(path)
