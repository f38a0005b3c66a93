"""Commands that talk to a real server on a tiny model, over a socket."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
import tiny
from command_line import crma
from socket_server import socket_server

from crma.models.base_model import BaseModel

ITEMS = [
    {"id": f"q{i}", "task": "legal", "question": f"Question {i}?", "answers": ["x"]}
    for i in range(3)
]


@pytest.fixture(scope="module")
def address(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server."""
    store = tiny.filled_store(tmp_path_factory.mktemp("served") / "store", base)
    with socket_server(base, store.root) as address:
        yield address


@pytest.fixture
def options(address: str, tmp_path: Path) -> tuple[str, ...]:
    """The options that name the server and its key."""
    key = tmp_path / "key"
    key.write_text("key\n")
    return ("--server", address, "--key-file", str(key))


def test_an_answer_is_printed_and_what_produced_it_is_a_note(options: tuple[str, ...]) -> None:
    asked = ("generate", "Hi", "--task", "legal", "--max-tokens", 5, *options)
    code, out, err = crma(*asked)
    assert code == 0
    assert err.startswith("legal, CRMA off: 5 tokens in ")
    assert crma(*asked, "--quiet") == (0, out, "")
    code, shown, err = crma(*asked, "--json")
    assert (code, err) == (0, "")
    body = json.loads(shown)
    assert body["text"] + "\n" == out
    assert body["provenance"]["task"]


def test_any_field_can_be_set_and_several_answers_are_lines(options: tuple[str, ...]) -> None:
    fields = ("--set", 'logit_bias={"34": 100}', "--set", "top_p=0.5", "--set", "stop=zz")
    code, out, _ = crma("generate", "Hi", "-n", 2, "--max-tokens", 3, *fields, *options)
    assert (code, out) == (0, "AAA\nAAA\n")


def test_a_prompt_may_come_from_stdin(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("Hi"))
    piped = crma("generate", "-", "--max-tokens", 3, "-q", *options)
    assert piped == crma("generate", "Hi", "--max-tokens", 3, "-q", *options)


def test_a_conversation_goes_on_until_a_line_is_empty(
    options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "Hi\nAnd then?\n\nnever sent\n"
    asked = ("chat", "--task", "legal", "--max-tokens", 3, "--temperature", 0, *options)
    monkeypatch.setattr("sys.stdin", StringIO(lines))
    code, out, _ = crma(*asked)
    assert code == 0
    monkeypatch.setattr("sys.stdin", StringIO(lines))
    code, shown, _ = crma(*asked, "--system", "Short.", "--json")
    messages = json.loads(shown)["messages"]
    roles = [message["role"] for message in messages]
    assert (code, roles) == (0, ["system", *("user", "assistant") * 2])
    assert len(out.splitlines()) >= 2


def test_an_ablation_on_a_server_reports_what_one_here_does(
    options: tuple[str, ...], tmp_path: Path, base: BaseModel
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    asked = ("--questions", file, "--variants", "task,base", "--max-tokens", 4)
    code, out, err = crma("ablate", *asked, *options, "--json")
    assert code == 0
    assert f"ablation: {2 * len(ITEMS)} of {2 * len(ITEMS)}" in err
    remote = json.loads(out)
    store = tiny.filled_store(tmp_path / "store", base)
    code, out, _ = crma(
        "ablate", *asked, "--store", store.root, "--model", base.path, "--json", "--quiet"
    )
    here = json.loads(out)
    assert code == 0
    assert remote["variants"] == here["variants"]
    assert remote["question_set"]["digest"] == here["question_set"]["digest"]
    assert "task - base" in crma("ablate", *asked, *options, "-q")[1]


def test_a_line_that_is_no_question_is_named_before_anything_is_sent(
    options: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps(ITEMS[0]) + '\n{"id": "q2"}\n')
    code, _, err = crma("ablate", "--questions", file, *options)
    assert (code, "mine line 2.task" in err) == (2, True)


@pytest.mark.parametrize(
    ("expected", "arguments", "said"),
    [
        (2, "generate hi --task legl", "Did you mean 'legal'?"),
        (2, "generate hi --max-tokens 0", "max_tokens"),
        (2, "generate hi --set tempereture=1", "tempereture"),
        (2, "generate hi --set nothing", "FIELD=JSON"),
        (1, "generate hi --task legal --crma", "crma: "),
        (2, "ablate --questions nowhere", "nowhere"),
        (2, "ablate --split holdout", "--split: needs the store on this machine."),
    ],
)
def test_what_the_server_refuses_is_one_line(
    expected: int, arguments: str, said: str, options: tuple[str, ...]
) -> None:
    code, out, err = crma(*arguments.split(), *options)
    assert (code, out) == (expected, "")
    *_, line = err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_a_missing_key_and_a_missing_server_say_what_to_do(address: str) -> None:
    code, _, err = crma("generate", "hi", "--server", address)
    assert (code, "--key-file" in err) == (1, True)
    code, _, err = crma("generate", "hi", "--server", "http://127.0.0.1:1")
    assert (code, "Start one with `crma serve`" in err) == (1, True)
    code, _, err = crma("generate", "hi", "--server", "nowhere")
    assert (code, "base_url must be the http or https address" in err) == (2, True)
