"""The `crma` command on a tiny model: results on stdout, errors in one line, exit codes 0, 1, 2."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny
from command_line import crma

from crma.core.digests import file_digest
from crma.data import splits as data
from crma.models.base_model import BaseModel
from crma.store.adapter_store import AdapterStore
from crma.store.opening import start_store


class Trained(NamedTuple):
    """The results of `crma train --ship`; read only."""

    store: Path
    control: Path  # trained without CRMA
    record: dict[str, Any]
    printed: dict[str, Any]
    noted: str


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, write_task: Any) -> Iterator[Path]:
    """A cache with two domains as if built, and their digests as if committed."""
    home = tmp_path_factory.mktemp("home")
    write_task(home / "data" / "legal", ("lease", "will"))
    write_task(home / "data" / "medical", ("liver", "heart"))
    files = (home / "data").glob("*/*")
    digests = {f"{path.parent.name}/{path.stem}": file_digest(path) for path in files}
    (home / "digests.json").write_text(json.dumps(digests))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "DIGESTS_FILE", home / "digests.json")
        patch.setenv("CRMA_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def trained(home: Path, base: BaseModel) -> Trained:
    """Both domains, trained with and without CRMA and shipped into two stores."""
    config, store, control = home / "run.toml", home / "store", home / "control"
    settings = 'tasks = ["medical", "legal"]\nepochs = 1\nbatch_size = 5\ndtype = "float32"\n'
    backbone = "[crma]\nnum_streams = 2\nstream_rank = 2\n"
    config.write_text(f'{settings}model = "{base.path}"\n{backbone}')
    code, out, err = crma(
        "train", config, "--out", home / "run", "--seed", 3, "--ship", store, "--json"
    )
    assert code == 0
    frozen = ("--arm", "FROZEN", "--ship", control)
    assert crma("train", config, "--out", home / "off", *frozen)[0] == 0
    record = json.loads((home / "run" / "record.json").read_text())
    return Trained(store, control, record, json.loads(out), err)


def test_train_writes_a_record_and_prints_its_summary(trained: Trained) -> None:
    assert trained.printed["loss"] == trained.record["loss"]
    assert trained.record["seed"] == 3


def test_train_writes_plain_lines_of_progress_where_stderr_is_no_terminal(trained: Trained) -> None:
    """A log was empty for minutes."""
    lines = trained.noted.splitlines()
    assert any(line.startswith("MODULAR seed 3: medical: 1 of ") for line in lines)
    assert any(line.startswith("measuring the shipped adapters: 0 of 2") for line in lines)
    assert not any("\x1b" in line or "━" in line for line in lines)


def test_shipping_a_finished_run_again_publishes_nothing(trained: Trained, home: Path) -> None:
    before = sorted(trained.store.rglob("*")), (trained.store / "channels.json").read_bytes()
    arguments = ("train", home / "run.toml", "--out", home / "run", "--seed", 3)
    code, _, err = crma(*arguments, "--ship", trained.store)
    after = sorted(trained.store.rglob("*")), (trained.store / "channels.json").read_bytes()
    assert (code, after) == (0, before)
    assert "tasks/medical: already published as v1" in err
    assert "backbone: already published as v1" in err


def test_a_joint_run_is_not_trained_to_be_shipped(home: Path, tmp_path: Path) -> None:
    arguments = ("train", home / "run.toml", "--out", tmp_path / "run", "--arm", "JOINT")
    code, _, err = crma(*arguments, "--ship", tmp_path / "store")
    assert (code, "a run of the arm JOINT has no per-task adapters to ship" in err) == (2, True)
    assert not (tmp_path / "run").exists()


def test_a_shipped_store_verifies(trained: Trained, base: BaseModel) -> None:
    code, out, err = crma("store", "verify", "--store", trained.store, "--model", base.path)
    assert (code, err) == (0, "")
    assert "legal, medical" in out


@pytest.mark.e2e
def test_an_ablation_of_a_split_adds_strengths_the_control_and_naive_bayes(
    trained: Trained, base: BaseModel
) -> None:
    code, out, _ = crma(
        *("ablate", "--store", trained.store, "--model", base.path, "--split", "validation"),
        *("--control", trained.control, "--strengths", "0,.5,1", "--json"),
    )
    assert code == 0
    result = json.loads(out)
    rows: dict[str, Any] = result["variants"]
    further = ["task+crma x0", "task+crma x0.5", "task+crma x1", "control", "naive_bayes"]
    assert list(rows) == ["task+crma", "task", "crma", "base", *further]
    assert [row["by_task"]["legal"]["scored"] for row in rows.values()] == [12] * 9
    for item in result["items"]:
        texts = {label: item["outputs"][label]["text"] for label in rows}
        assert texts["task+crma x0"] == texts["task"]
        assert texts["task+crma x1"] == texts["task+crma"]
    guesses = {item["outputs"]["naive_bayes"]["text"] for item in result["items"]}
    assert guesses == {"lease", "will", "liver", "heart"}


def test_a_split_of_a_task_in_a_folder_of_its_own_is_asked(
    base: BaseModel, write_task: Any, tmp_path: Path
) -> None:
    write_task(tmp_path / "mine", ("yes", "no"))
    config = tmp_path / "run.toml"
    config.write_text(
        f'tasks = ["{tmp_path / "mine"}"]\narm = "FROZEN"\nepochs = 1\nmodel = "{base.path}"\n'
    )
    store = tmp_path / "store"
    assert crma("train", config, "--out", tmp_path / "run", "--ship", store)[0] == 0
    tiny.publish(AdapterStore(store), base, "imported", 1)
    options = ("--model", base.path, "--split", "holdout", "--variants", "task,base", "--json")
    code, out, err = crma("ablate", "--store", store, *options)
    result = json.loads(out)
    assert (code, result["question_set"]["items"]) == (0, 12)
    assert list(result["variants"]) == ["task", "base", "naive_bayes"]
    assert "imported is left out: it does not say where its data is" in err


def test_a_task_is_asked_from_the_folder_it_was_trained_on_though_a_domain_has_its_name(
    home: Path, base: BaseModel, write_task: Any, tmp_path: Path
) -> None:
    """It was scored on the domain's data, in silence. An import of that name is asked from it."""
    write_task(tmp_path / "legal", ("yes", "no"))
    config = tmp_path / "run.toml"
    config.write_text(
        f'tasks = ["{tmp_path / "legal"}"]\narm = "FROZEN"\nepochs = 1\nmodel = "{base.path}"\n'
    )
    store = tmp_path / "store"
    assert crma("train", config, "--out", tmp_path / "run", "--ship", store)[0] == 0
    tiny.publish(AdapterStore(store), base, "medical", 1)
    options = ("--model", base.path, "--split", "holdout", "--variants", "base", "--json")
    code, out, _ = crma("ablate", "--store", store, *options)
    assert code == 0
    guesses: dict[str, set[str]] = {"legal": set(), "medical": set()}
    for item in json.loads(out)["items"]:
        guesses[item["task"]].add(item["outputs"]["naive_bayes"]["text"])
    assert guesses == {"legal": {"yes", "no"}, "medical": {"liver", "heart"}}


NO_STORE = [
    "ablate --store {folder}",
    "ablate --store {store} --control {folder} --split validation",
    "store gc --store {folder}",
    "store ls --store {folder}",
    "store promote v2 --store {folder}",
    "store rollback --store {folder}",
    "store show medical --store {folder}",
    "store sign key.pem --store {folder}",
    "store verify --store {folder}",
]


@pytest.mark.parametrize("arguments", NO_STORE)
@pytest.mark.parametrize("there", ["missing", "empty", "other"])
def test_a_folder_that_is_no_store_is_refused_by_name(
    arguments: str, there: str, store: AdapterStore, tmp_path: Path
) -> None:
    """`crma store init` is no advice for a folder that it would refuse."""
    folder = tmp_path / "typo"
    if there != "missing":
        folder.mkdir()
    if there == "other":
        (folder / "notes.txt").write_text("mine")
    code, out, err = crma(*arguments.format(folder=folder, store=store.root).split())
    assert (code, out) == (2, "")
    assert str(folder) in err
    assert (f"`crma store init --store {folder}`" in err) == (there != "other")
    assert folder.exists() == (there != "missing")


def test_a_store_is_started_on_purpose_and_only_where_nothing_else_is(
    base: BaseModel, tmp_path: Path
) -> None:
    new = ("--store", tmp_path / "new")
    assert crma("store", "init", *new)[0] == 0
    assert crma("store", "verify", *new, "--model", base.path)[0] == 0
    assert crma("store", "init", *new)[0] == 0  # it is one already
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    code, _, err = crma("store", "init", "--store", tmp_path / "other")
    assert (code, "holds something else than an adapter store" in err) == (1, True)


def test_an_import_says_that_it_started_a_store(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    folder = store.task("medical").path
    for number in range(2):
        arguments = (folder, "other", "--store", tmp_path / "new", "--model", base.path)
        code, _, err = crma("store", "import", *arguments)
        assert code == 0
        assert ("starts a new store" in err) == (number == 0)


def test_a_backbone_that_serves_already_is_not_promoted(trained: Trained, base: BaseModel) -> None:
    code, _, err = crma("store", "promote", "v1", "--store", trained.store, "--model", base.path)
    assert (code, "this backbone serves" in err) == (2, True)


def test_the_first_backbone_is_not_rolled_back(trained: Trained) -> None:
    code, _, err = crma("store", "rollback", "--store", trained.store)
    assert (code, "No backbone served before v1" in err) == (2, True)


def test_a_roll_back_names_the_tasks_that_stop(base: BaseModel, store: AdapterStore) -> None:
    first = store.backbone()
    second = tiny.publish_backbone(store, base, 1, lineage=[first.digest])
    tiny.publish(store, base, "new", 3, backbone=second.digest)
    code, _, err = crma("store", "rollback", "--store", store.root)
    assert code == 0
    assert err.splitlines() == ["no longer served: tasks/new"]
    assert store.task_names() == ("legal", "medical")


def test_an_ablation_is_a_table(base: BaseModel, store: AdapterStore) -> None:
    options = ("--model", base.path, "--max-tokens", 3, "--variants", "task,base")
    code, out, _ = crma("ablate", "--store", store.root, *options)
    assert (code, "task - base" in out) == (0, True)


def test_a_sound_store_verifies_and_a_damaged_one_does_not(
    base: BaseModel, store: AdapterStore
) -> None:
    arguments = ("--store", store.root, "--model", base.path)
    code, out, _ = crma("store", "verify", *arguments, "--json")
    assert (code, json.loads(out)["problems"]) == (0, [])
    assert json.loads(out)["certificate"]["holds"]
    tiny.flip_bit(store.task("medical").path / "adapter_model.safetensors")
    (store.root / "tasks" / "[b]odd").mkdir()
    code, out, _ = crma("store", "verify", *arguments, "--json")
    assert (code, len(json.loads(out)["problems"])) == (1, 2)
    code, out, _ = crma("store", "verify", *arguments, "--quiet")
    assert code == 1
    assert "tasks/medical/v1: adapter_model.safetensors: not the file that was published" in out
    assert "tasks/[b]odd: does not belong here" in out  # and is not taken for markup


def test_an_adapter_from_elsewhere_is_imported_under_a_name(
    base: BaseModel, store: AdapterStore
) -> None:
    folder = store.task("medical").path  # these are PEFT's files
    options = ("--store", store.root, "--model", base.path)
    code, out, _ = crma("store", "import", folder, "other", *options)
    entry = store.task("other")
    assert (code, entry.manifest.backbone) == (0, None)
    assert entry.digest in out


def test_an_import_over_a_serving_task_says_what_it_replaces_and_repeats_nothing(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    """It replaced the task in silence, and the same import again was another version."""
    options = ("task", "--store", tmp_path / "new", "--model", base.path)
    first = ("store", "import", store.task("medical").path, *options)
    second = ("store", "import", store.task("legal").path, *options)
    undo = f"undo: crma store rollback --channel tasks/task --store {tmp_path / 'new'}"
    target = AdapterStore(tmp_path / "new")
    for arguments, said, versions in [
        (first, None, ("v1",)),
        (first, "tasks/task: already published as v1", ("v1",)),
        (second, f"replaces v1; {undo}", ("v1", "v2")),
        ((*second, "--prompt-format", "raw"), f"replaces v2; {undo}", ("v1", "v2", "v3")),
    ]:
        code, _, err = crma(*arguments)
        assert code == 0
        assert said is None or said in err.splitlines()
        assert ("replaces" in err) == (said is not None and "replaces" in said)
        assert target.task_versions("task") == versions


def test_an_import_mends_a_task_whose_files_are_damaged(
    base: BaseModel, store: AdapterStore, tmp_path: Path
) -> None:
    target = AdapterStore(tmp_path / "new")
    arguments = ("store", "import", store.task("medical").path, "task", "--store", target.root)
    assert crma(*arguments, "--model", base.path)[0] == 0
    tiny.flip_bit(target.task("task").path / "adapter_model.safetensors")
    assert crma(*arguments, "--model", base.path)[0] == 0
    entry = target.task("task")
    assert entry.version == "v2"
    entry.read()


STORE = "--store {store} --model {base}"
ERRORS = [
    (1, "store verify --store {store} --model absent", "run `crma pull absent` first"),
    (2, f"ablate {STORE} --questions none.jsonl", "cannot be read"),
    (2, f"ablate {STORE} --strengths a", "--strengths: 'a' is not a strength. (allowed"),
    (2, f"ablate {STORE} --strengths 1,nan", "--strengths: 'nan' is not a strength."),
    (2, f"ablate {STORE} --max-tokens 0", "--max-tokens: not the length of an answer."),
    (2, f"ablate {STORE} --scorer exakt", "Did you mean 'exact'?"),
    (2, "ablate --store {new} --model {base}", "no public question set: ask a split (--split)"),
    (2, "store rollback --store {store} --channel tasks/typo", "backbone, tasks/legal, tasks/med"),
    (2, "store show medicl --store {store}", "(allowed: legal, medical) Did you mean 'medical'?"),
    (2, "store import {store}/nowhere other --store {store} --model {base}", "no such folder"),
    (1, "train {store}/run.toml", "[a-z0-9][a-z0-9._-]{0,63}"),
    (2, "data legl", "Did you mean 'legal'?"),
    (2, f"ablate {STORE} --questions {{bad}}", "error: bad line 2.task: Field required."),
    (2, "store ls --store /dev/null/x", "/dev/null/x"),
]


@pytest.mark.parametrize(("expected", "arguments", "said"), ERRORS)
def test_an_error_is_one_line_that_says_what_to_do(
    expected: int, arguments: str, said: str, base: BaseModel, store: AdapterStore
) -> None:
    """Also if the command is to be quiet. Wrong use is 2, anything else 1."""
    new = start_store(store.root.parent / "new").root
    (store.root / "run.toml").write_text(f'tasks = ["data/My Task"]\nmodel = "{base.path}"\n')
    bad = store.root.parent / "bad.jsonl"
    bad.write_text('\n{"id": "a"}\n')
    words = arguments.format(store=store.root, base=base.path, new=new, bad=bad).split()
    code, out, err = crma(*words, "--quiet")
    assert (code, out) == (expected, "")
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("ablat", "Did you mean 'ablate'?"),
        ("store verfy", "Did you mean 'verify'?"),
        ("store ls --stor x", "--store"),
        ("store show", "Missing argument"),
        ("generate hi --max-tokens many", "'--max-tokens': Input should be a valid integer"),
        ("ablate --split test", "'holdout'"),
        ("generate hi --key-file nowhere", "'nowhere' does not exist"),
    ],
)
def test_a_mistyped_command_line_is_wrong_use_and_names_what_is_near(
    arguments: str, said: str
) -> None:
    code, out, err = crma(*arguments.split())
    assert (code, out) == (2, "")
    assert said in err
