"""The `crma` command on a tiny model: results on stdout, one line for an error, exit codes 0, 1, 2."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from crma.cli.command import main
from crma.core.digests import file_digest
from crma.data import splits as data
from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def crma(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command; its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["crma", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


def test_what_is_trained_ships_verifies_and_is_evaluated(
    crma: Command, base: BaseModel, write_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domains = {"legal": ("lease", "will"), "medical": ("liver", "heart")}
    for domain, answers in domains.items():  # as if built, and their digests as if committed
        write_task(tmp_path / "data" / domain, answers)
    files = {
        f"{path.parent.name}/{path.stem}": file_digest(path)
        for path in (tmp_path / "data").glob("*/*")
    }
    (tmp_path / "digests.json").write_text(json.dumps(files))
    monkeypatch.setattr(data, "DIGESTS_FILE", tmp_path / "digests.json")
    monkeypatch.setenv("CRMA_HOME", str(tmp_path))
    config, store = tmp_path / "run.toml", tmp_path / "store"
    settings = 'tasks = ["medical", "legal"]\nepochs = 1\nbatch_size = 5\ndtype = "float32"\n'
    config.write_text(
        f'{settings}model = "{base.path}"\n[crma]\nnum_streams = 2\nstream_rank = 2\n'
    )
    code, out, _ = crma("train", config, "--out", tmp_path / "run", "--seed", 3, "--ship", store)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (code, json.loads(out)["loss"], record["seed"]) == (0, record["loss"], 3)
    assert (
        crma(
            "train",
            config,
            "--out",
            tmp_path / "off",
            "--arm",
            "FROZEN",
            "--ship",
            tmp_path / "control",
        )[0]
        == 0
    )
    code, out, err = crma("verify", store, "--model", base.path)
    assert (code, out) == (0, "")
    assert "legal, medical" in err
    options = (
        "--model",
        base.path,
        "--split",
        "validation",
        "--control",
        tmp_path / "control",
        "--json",
    )
    code, out, _ = crma("ablate", store, *options, "--strengths", "0,.5,1")
    rows: dict[str, Any] = json.loads(out)["variants"]
    further = ["task+crma x0", "task+crma x0.5", "task+crma x1", "control", "naive_bayes"]
    assert list(rows) == ["task+crma", "task", "crma", "base", *further]
    assert [row["by_task"]["legal"]["scored"] for row in rows.values()] == [12] * 9
    texts = [
        {label: item["outputs"][label]["text"] for label in rows}
        for item in json.loads(out)["items"]
    ]
    assert all(
        of["task+crma x0"] == of["task"] and of["task+crma x1"] == of["task+crma"] for of in texts
    )
    assert {of["naive_bayes"] for of in texts} == {"lease", "will", "liver", "heart"}
    code, _, err = crma("promote", "v1", "--store", store, "--model", base.path)
    assert (code, "this backbone serves" in err) == (2, True)
    code, _, err = crma("rollback", "--store", store)
    assert (code, "No backbone served before v1" in err) == (2, True)


def test_an_ablation_is_a_table(crma: Command, base: BaseModel, store: AdapterStore) -> None:
    options = ("--model", base.path, "--max-tokens", 3, "--variants", "task,base")
    code, out, _ = crma("ablate", store.root, *options)
    assert (code, "task - base" in out) == (0, True)


def test_a_sound_store_verifies_and_a_damaged_one_does_not(
    crma: Command, base: BaseModel, store: AdapterStore
) -> None:
    code, out, _ = crma("verify", store.root, "--model", base.path, "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    assert json.loads(out)["certificate"]["holds"]
    tiny.flip_bit(store.task("medical").path / "adapter_model.safetensors")
    (store.root / "tasks" / "[b]odd").mkdir()
    code, out, err = crma("verify", store.root, "--model", base.path, "--json")
    assert (code, len(json.loads(out)["problems"])) == (1, 2)
    assert "tasks/medical/v1: adapter_model.safetensors: not the file that was published" in err
    assert "tasks/[b]odd: does not belong here" in err  # and is not taken for markup


def test_an_adapter_from_elsewhere_is_imported_under_a_name(
    crma: Command, base: Any, store: AdapterStore
) -> None:
    folder = store.task("medical").path  # these are PEFT's files
    code, _, err = crma("import", folder, "other", "--store", store.root, "--model", base.path)
    entry = store.task("other")
    assert (code, entry.manifest.backbone) == (0, None)
    assert entry.digest in err


ERRORS = [
    ("verify {store} --model absent", "run `crma pull absent` first"),
    ("ablate {store} --model {base} --questions none.jsonl", "cannot be read"),
    ("ablate {store} --model {base} --split test", "'test' is not a split"),
    ("train {store}/run.toml", "[a-z0-9][a-z0-9._-]{0,63}"),
    ("data astrology", "not a built-in domain"),
]


@pytest.mark.parametrize(("arguments", "said"), ERRORS)
def test_an_error_is_one_line_that_says_what_to_do(
    arguments: str, said: str, crma: Command, base: BaseModel, store: AdapterStore
) -> None:
    (store.root / "run.toml").write_text(f'tasks = ["data/My Task"]\nmodel = "{base.path}"\n')
    code, out, err = crma(*arguments.format(store=store.root, base=base.path).split())
    *progress, line = err.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("error: ")
    assert said in line
    assert all("loading the model" in text for text in progress)
