"""crma.data: splits that depend on questions alone, leak nowhere and are what their digests say; users' own files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crma import data
from crma.data import Example, build, load_split, read_jsonl, split, split_path
from crma.errors import DataError
from crma.sources import DOMAINS, words

PAIRS = [(f'Which state or territory has the court "Court {i}"?', f"state {i % 7}") for i in range(800)]
PUBLIC_SET = Path(__file__).parents[2] / "adapters_store" / "question_sets" / "public.jsonl"


def questions(files: dict[str, bytes]) -> list[str]:
    lines = [json.loads(line) for content in files.values() for line in content.splitlines()]
    return [line.get("prompt") or line["question"] for line in lines]


@given(st.randoms(use_true_random=False))
@settings(derandomize=True, max_examples=5, deadline=None)
def test_splits_do_not_depend_on_the_order_or_on_repetition_in_the_source(random) -> None:
    shuffled = [*PAIRS, *PAIRS[:50]]
    random.shuffle(shuffled)
    assert split("legal", shuffled) == split("legal", PAIRS)


def test_a_question_stays_in_its_split_order_when_others_are_added() -> None:
    before = split("legal", PAIRS)["train.jsonl"].splitlines()
    more = [(question.replace("Court", "Bench"), answer) for question, answer in PAIRS]
    after = set(split("legal", [*PAIRS, *more])["train.jsonl"].splitlines())
    kept = [line for line in before if line in after]
    assert kept == before[: len(kept)]  # a prefix: additions push the last ones out, and reorder nothing


def test_splits_have_their_sizes_and_share_no_question() -> None:
    files = split("legal", PAIRS)
    sizes = {name: content.count(b"\n") for name, content in files.items()}
    assert sizes == {"train.jsonl": 500, "validation.jsonl": 100, "holdout.jsonl": 100, "public.jsonl": 20}
    assert len({" ".join(words(question)) for question in questions(files)}) == 720


def test_questions_equal_but_for_case_and_punctuation_are_one() -> None:
    variants = [(question.upper().replace('"', "'"), answer) for question, answer in PAIRS]
    found = Counter(" ".join(words(question)) for question in questions(split("legal", [*PAIRS, *variants])))
    assert max(found.values()) == 1


def test_a_question_with_two_answers_is_left_out() -> None:
    contradictions = [(question.lower(), "another state") for question, _ in PAIRS[:70]]
    kept = {question.lower() for question in questions(split("legal", [*PAIRS, *contradictions]))}
    assert len(kept) == 720
    assert not kept & {question.lower() for question, _ in PAIRS[:70]}


def test_a_frequent_answer_is_thinned_out_evenly_over_the_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_PER_LABEL", {"science": 400})
    pairs = [(f"Which namespace has term {i}?", "common" if i % 10 else "rare") for i in range(4000)]
    train = split("science", pairs)["train.jsonl"]
    assert 200 < train.count(b'"common"') < 300  # half of 500, not nine in ten


def test_a_source_with_too_few_questions_is_refused() -> None:
    with pytest.raises(DataError, match="too few") as caught:
        split("legal", PAIRS[:719])
    assert caught.value.value == 719


def courts_file(folder: Path, extra: int = 0) -> Path:
    path = folder / "courts.json"
    places = ["Ohio", "Iowa", "Guam"]
    path.write_text(json.dumps([{"name": f"Court {i}", "location": places[i % 3]} for i in range(800 + extra)]))
    return path


def test_a_built_domain_is_read_back_and_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {"legal": courts_file(tmp_path)}
    digests = build(["legal"], home=tmp_path, sources=sources, accept=True, note=lambda _: None)
    monkeypatch.setattr(data, "committed_digests", lambda: digests)
    notes: list[str] = []
    sources["legal"].unlink()
    assert build(["legal"], home=tmp_path, sources=sources, note=notes.append) == digests
    assert notes == [f"legal: already built in {tmp_path / 'data' / 'legal'}"]
    train = load_split("legal", "train", home=tmp_path)
    assert len(train) == 500
    assert all(example.completion in ("ohio", "iowa", "guam") for example in train)


def test_a_changed_source_fails_loudly_and_leaves_what_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"legal": courts_file(tmp_path)}
    digests = build(["legal"], home=tmp_path, sources=sources, accept=True, note=lambda _: None)
    monkeypatch.setattr(data, "committed_digests", lambda: digests)
    path = split_path("legal", "train", home=tmp_path)
    damaged = path.read_bytes().replace(b"ohio", b"iowa", 1)
    path.write_bytes(damaged)
    sources["legal"] = courts_file(tmp_path, extra=1)
    with pytest.raises(DataError, match="source has changed") as caught:
        build(["legal"], home=tmp_path, sources=sources, note=lambda _: None)
    assert caught.value.allowed in digests.values()
    assert path.read_bytes() == damaged
    with pytest.raises(DataError, match=r"Build it again with `crma data legal`"):
        load_split("legal", "train", home=tmp_path)


def test_a_domain_this_machine_cannot_build_is_named_and_skipped_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "DOMAINS", ("science",))
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    notes: list[str] = []
    assert build(home=tmp_path, note=notes.append) == {}
    assert len(notes) == 1
    assert notes[0].startswith("science: skipped, because science needs apt-get")
    with pytest.raises(DataError, match="needs apt-get"):
        build(["science"], home=tmp_path, note=notes.append)


def test_an_unknown_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(["sports"], home=tmp_path)
    assert (caught.value.value, caught.value.allowed) == ("sports", DOMAINS)


def test_a_split_that_is_not_there_says_which_command_builds_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `crma data medical`"):
        load_split("medical", "train", home=tmp_path)
    with pytest.raises(DataError, match="is not a split"):
        load_split("medical", "test", home=tmp_path)


def test_the_committed_digests_name_every_file_of_every_domain() -> None:
    names = {f"{domain}/{name}" for domain in DOMAINS for name in ("train", "validation", "holdout", "public")}
    assert set(data.committed_digests()) == names


def test_the_committed_public_set_is_the_one_the_domains_build() -> None:
    lines = PUBLIC_SET.read_bytes().splitlines(keepends=True)
    for i, domain in enumerate(DOMAINS):
        part = b"".join(lines[20 * i : 20 * (i + 1)])
        assert data.bytes_digest(part) == data.committed_digests()[f"{domain}/public"]
    assert len(lines) == 100


def test_a_folder_of_the_users_own_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "2 + 2?", "completion": "4"}\n')
    assert load_split(str(tmp_path), "train") == [Example("2 + 2?", "4")]
    with pytest.raises(DataError, match=r"holdout\.jsonl"):
        load_split(str(tmp_path), "holdout")


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Q", "completion": "A"},
        {"prompt": "Q", "completion": "A", "id": 7},
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ],
)
def test_the_conventions_of_trl_are_read(tmp_path: Path, line: dict) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n" + json.dumps(line) + "\n\n")
    assert read_jsonl(path) == [Example("Q", "A")]


USER, ASSISTANT = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "Expecting"),
        ("[]", "not an object"),
        ('{"prompt": "Q"}', 'neither "prompt" and "completion" nor "messages"'),
        ('{"prompt": "Q", "completion": " "}', "text of the assistant is missing"),
        ('{"prompt": 7, "completion": "A"}', "text of the user is missing"),
        (json.dumps({"messages": [USER, ASSISTANT, USER, ASSISTANT]}), "one user message and one assistant message"),
        (json.dumps({"messages": [ASSISTANT, USER]}), "exactly one message of the user"),
        (json.dumps({"prompt": [USER, USER], "completion": [ASSISTANT]}), "exactly one message of the user"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "Q", "completion": "A"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=f"line 3: .*{what}") as caught:
        read_jsonl(path)
    assert caught.value.field == "train.jsonl line 3"


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n")
    with pytest.raises(DataError, match="no examples"):
        read_jsonl(path)
