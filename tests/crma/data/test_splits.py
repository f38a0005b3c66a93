"""Splits depend on the questions alone, share none, and match their digests; users' own files."""

import hashlib
import json
import random
from functools import partial
from pathlib import Path

import pytest
from paths import STORE

from crma.core.errors import DataError
from crma.data import splits as data
from crma.data.clinc import CLINC_TASKS, read_clinc
from crma.data.examples import Example, read_jsonl
from crma.data.sources import DOMAINS, read_domain, words
from crma.data.splits import SPLITS, build, build_clinc, load_split, split, split_clinc, split_path

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
        "reserve.jsonl": sizes["reserve.jsonl"],
    }
    asked = questions(files)
    assert len({" ".join(words(question)) for question in asked}) == len(asked)
    assert len(asked) == 720 + sizes["reserve.jsonl"]


def is_even(question: str) -> bool:
    """As in the definition of the reserve."""
    return int(hashlib.sha256(f"reserve{question}".encode()).hexdigest(), 16) % 2 == 0


def test_the_reserve_is_even_and_what_it_leaves_is_odd_or_too_much() -> None:
    """The odd half stays untouched, for checks by outsiders."""
    many = [(f'Which state or territory has the court "{i} Court"?', "ohio") for i in range(2000)]
    files = split("legal", many)
    reserved = questions({"reserve.jsonl": files.pop("reserve.jsonl")})
    used = set(questions(files))
    assert len(reserved) == len(set(reserved)) == 300
    assert all(is_even(question) for question in reserved)
    assert not used & set(reserved)
    few = split("legal", many[:800])
    left = {question for question, _ in many[:800]} - set(questions(few))
    assert 0 < len(left) < 80
    assert not any(is_even(question) for question in left)


def test_a_question_with_two_answers_is_left_out_and_too_few_questions_are_refused() -> None:
    contradictions = [(question.lower(), "another state") for question, _ in PAIRS[:80]]
    files = split("legal", [*PAIRS, *contradictions])
    kept = {question.lower() for question in questions(files)}
    assert (len(kept), files["reserve.jsonl"]) == (720, b"")
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
    files = ("train", "validation", "holdout", "public", "reserve")
    names = {f"{domain}/{name}" for domain in DOMAINS for name in files}
    names |= {f"{task}/{split}" for task in CLINC_TASKS for split in SPLITS}
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


def test_a_reserve_is_asked_where_there_is_one(tmp_path: Path, courts: Path) -> None:
    build(["legal"], sources={"legal": courts})
    reserve = load_split("legal", "reserve")
    used = [example.prompt for name in SPLITS for example in load_split("legal", name)]
    assert reserve
    assert not {example.prompt for example in reserve} & set(used)
    split_path("legal", "reserve").unlink()  # as in a cache of an earlier version
    assert len(load_split("legal", "holdout")) == 100
    with pytest.raises(DataError, match="run `crma data legal`"):
        load_split("legal", "reserve")
    (tmp_path / "own").mkdir()
    with pytest.raises(DataError, match=r"has no reserve\.jsonl, which only some experiments ask"):
        load_split(str(tmp_path / "own"), "reserve")


@pytest.fixture
def clinc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like that of CLINC150: two intents a domain, four training questions each."""
    domains, utterances = {}, {"train": [], "val": [], "test": [], "oos_test": [["hm", "oos"]]}
    for task in CLINC_TASKS:
        domain = task.removeprefix("clinc-").replace("-", "_")
        domains[domain] = [f"{domain}_one", f"{domain}_two"]
        for intent in domains[domain]:
            for number in range(4):
                utterances["train"].append([f"train {intent} {number}", intent])
            utterances["train"].append([f"Test, {intent}!", intent])  # asked by the test too
            utterances["train"].append([f"train {intent} 0?", intent])  # asked twice
            utterances["val"].append([f"val {intent}", intent])
            utterances["test"].append([f"test {intent}", intent])
    folder = tmp_path / "clinc150"
    folder.mkdir()
    (folder / "data_full.json").write_text(json.dumps(utterances))
    (folder / "domains.json").write_text(json.dumps(domains))
    digests = {}
    for task, files in split_clinc(read_clinc(folder)).items():
        digests |= data.digests(task, files)
    monkeypatch.setattr(data, "committed_digests", lambda: digests)
    monkeypatch.setenv("CRMA_HOME", str(tmp_path / "home"))
    return folder


def test_clinc_is_ten_tasks_whose_training_data_begins_with_some_of_every_intent(
    clinc: Path,
) -> None:
    assert set(build_clinc(clinc)) == {f"{task}/{name}" for task in CLINC_TASKS for name in SPLITS}
    train = load_split("clinc-credit-cards", "train")
    assert len(train) == 8  # without those that the test asks, or that were asked before
    for k in range(1, 5):
        of_every_intent = [example.completion for example in train[: 2 * k]]
        assert sorted(of_every_intent) == sorted(k * ["credit cards one", "credit cards two"])
    (first, second) = load_split("clinc-credit-cards", "holdout")
    assert first == Example('What does the user want? "test credit_cards_one"', "credit cards one")
    assert second.completion == "credit cards two"


def test_clinc_is_built_once_and_only_from_its_own_source(clinc: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run `crma data clinc`"):
        load_split("clinc-banking", "train")
    with pytest.raises(DataError, match="--source clinc=FOLDER"):
        build_clinc(None)
    build_clinc(clinc)
    notes: list[str] = []
    build_clinc(None, note=notes.append)  # needs no source any more
    assert notes == [f"clinc: already built in {tmp_path / 'home' / 'data'}"]
    split_path("clinc-banking", "train").write_text("")
    changed = (clinc / "data_full.json").read_text().replace("train banking_one 1", "else")
    (clinc / "data_full.json").write_text(changed)
    with pytest.raises(DataError, match="source has changed"):
        build_clinc(clinc)
    with pytest.raises(DataError, match="is not a folder of CLINC150"):
        build_clinc(tmp_path)
