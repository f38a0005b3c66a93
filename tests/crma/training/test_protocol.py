"""crma.training.protocol: what each arm trains and measures, and runs that are killed and go on to the same result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crma.core.errors import TrainingError
from crma.data.examples import read_jsonl
from crma.method.injection import Plan
from crma.models.base_model import BaseModel
from crma.store import publication
from crma.store.adapter_store import AdapterStore
from crma.training import protocol
from crma.training.config import TrainConfig
from crma.training.loop import TaskTrainer
from crma.training.protocol import Run, new_backbone

TASKS = ("first", "second")
STEPS = 12  # a task
Make = Callable[..., Run]


@pytest.fixture(scope="module")
def data(write_task: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of one's own; read only."""
    root = tmp_path_factory.mktemp("data")
    for task, answers in zip(
        (*TASKS, "third"), (("yes", "no"), ("left", "right"), ("up", "down")), strict=True
    ):
        write_task(root / task, answers)
    return root


@pytest.fixture(scope="module")
def make(base: BaseModel, data: Path) -> Make:
    """A run of two tasks of twelve steps; anything else by name."""
    crma = {"num_streams": 2, "stream_rank": 2, "later_scale": 0.5}
    settings = {"epochs": 2, "batch_size": 2, "dtype": "float32", "lora": {"rank": 2, "alpha": 4.0}}

    def run(out: Path, arm: str = "MODULAR", *, tasks: Any = TASKS, **changes: Any) -> Run:
        paths = [str(data / task) for task in tasks]
        changes["crma"] = crma | changes.get("crma", {})
        return Run(
            TrainConfig.from_dict(settings | changes | {"arm": arm, "tasks": paths}),
            base,
            out,
            lambda *_: None,
        )

    return run


@pytest.fixture(scope="module")
def modular(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A finished run of the method, and its record; read only."""
    run = make(tmp_path_factory.mktemp("runs") / "modular")
    return run, run.execute()


def log_of(out: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for task in TASKS
        for line in (out / "work" / task / "log.jsonl").read_text().splitlines()
    ]


def loss_of(run: Run, t: int, plan: Plan) -> float:
    examples = read_jsonl(Path(run.config.tasks[t]) / "holdout.jsonl")
    return run.evaluator.measure(plan, run.evaluator.encode(examples)).loss


def test_the_record_holds_what_was_measured_from_the_snapshots(modular: tuple[Run, Any]) -> None:
    run, record = modular
    assert json.loads((run.folder / "record.json").read_text()) == record
    tasks = [[(None, run.store.task(task).load().to("cpu", torch.float32))] for task in TASKS]
    crma = [
        [(None, run.store.backbone(f"v{i}").load().folded("cpu", torch.float32))] for i in (1, 2)
    ]
    plans = [
        [Plan(), Plan()],
        [Plan(tasks[0], crma[0]), Plan([], crma[0])],  # task 2 has no LoRA yet
        [Plan(tasks[0], crma[1]), Plan(tasks[1], crma[1])],
    ]
    expected = [[loss_of(run, t, plan) for t, plan in enumerate(row)] for row in plans]
    assert record["loss"] == [pytest.approx(row, abs=1e-6) for row in expected]
    assert [len(row) for row in record["accuracy"]] == [2, 2, 2]
    assert record["drift"] == [
        pytest.approx(100 * (expected[2][0] / expected[1][0] - 1), abs=1e-3),
        0,
    ]
    assert record["drift"][0] != 0
    assert record["loss"][1][0] < record["loss"][0][0]
    assert record["steps"] == 2 * STEPS
    rows = [row for task in run.train_rows.values() for row in task]
    assert record["training"]["tokens"] == 2 * sum(
        len(row.prompt) + len(row.answer) - 1 for row in rows
    )


def test_snapshots_know_their_ancestors_and_their_data(
    modular: tuple[Run, Any], data: Path
) -> None:
    run, record = modular
    digests, entries = record["digests"], [run.store.task(task) for task in TASKS]
    assert run.store.backbone("v2").manifest.lineage == (digests["backbones"][0],)
    assert [entry.manifest.backbone for entry in entries] == digests["backbones"]
    assert [entry.digest for entry in entries] == list(digests["tasks"].values())
    trained_on = entries[1].manifest.trained_on
    assert set(trained_on.data) == {"second/train", "second/validation", "second/holdout"}
    assert trained_on.config == run.config.model_dump(mode="json")
    assert len(list((data / "first").iterdir())) == 3  # a run writes nothing beside the data


def test_the_mixing_gradient_is_alive_and_the_norm_is_logged_with_it(
    modular: tuple[Run, Any],
) -> None:
    run, record = modular
    log = log_of(run.folder)
    crma = [line["crma"] for line in log]
    assert [line["step"] for line in log] == 2 * list(range(STEPS))
    assert crma[0]["grad_S"] == crma[0]["moved"] == crma[0]["W_norm"] == [0.0, 0.0]
    assert all(min(line["grad_S"]) > 0 for line in crma[10:])
    assert min(crma[-1]["moved"]) > 0
    assert set(log[0]["grad_norm"]) == {"lora", "S", "R", "W", "gamma"}
    assert record["norm_log"]["steps"] == 2 * STEPS
    assert (
        record["norm_log"]["max_norm_deviation"]
        == max(max(line["c_M_minus_1"]) for line in crma)
        <= 1e-6
    )


def at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, before: bool) -> None:
    """The process dies just after (or before) one call of a function."""
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def dying(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == number
        result = None if now and before else real(*args, **kwargs)
        if now:
            raise KeyboardInterrupt
        return result

    patch.setattr(owner, name, dying)


DEATHS: dict[str, tuple[Any, str, int, bool]] = {
    "in the first task": (TaskTrainer, "_check", 9, False),
    "in the second task": (TaskTrainer, "_check", STEPS + 8, False),
    "between backbone and task": (AdapterStore, "publish_backbone", 2, False),
    "before the task serves": (publication, "write_channels", 2, True),
    "before the task counts": (AdapterStore, "publish_task", 1, False),
    "before the record": (protocol, "hardware", 1, True),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_goes_on_to_the_same_result(
    death: str, modular: Any, make: Make, tmp_path: Path
) -> None:
    run, record = modular
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, *DEATHS[death])
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path).execute()
    assert not (tmp_path / "record.json").exists()
    again = make(tmp_path).execute()
    for key in ("digests", "loss", "accuracy", "drift", "steps", "norm_log"):
        assert again[key] == record[key]
    assert again["training"]["tokens"] == record["training"]["tokens"]
    assert log_of(tmp_path) == log_of(run.folder)
    assert AdapterStore(tmp_path / "store").verify() == []


def test_a_folder_belongs_to_one_config(modular: tuple[Run, Any], make: Make) -> None:
    run, record = modular
    with pytest.raises(TrainingError, match="another config"):
        make(run.folder, seed=1).execute()
    assert make(run.folder).execute()["loss"] == record["loss"]  # nothing is trained again


WRONG = [
    ({"lora": {"lr": 1e30}}, "first: loss or gradient is not finite"),
    ({"crma": {"lr": 1e-40}}, "first: the gradient of M is 0 at step 10"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_run_gone_wrong_stops_and_publishes_nothing(
    changes: Any, message: str, make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, **changes)
    with pytest.raises(TrainingError, match=message):
        run.execute()
    assert run.store.task_names() == ()


def test_a_stopped_backbone_keeps_every_bit_that_the_methods_had_after_its_first_task_and_nothing_drifts(
    modular: Any, make: Make, tmp_path: Path
) -> None:
    _, record = modular
    stopped = make(tmp_path, "MODULAR-stop", tasks=(*TASKS, "third")).execute()
    assert stopped["digests"]["backbones"] == 3 * record["digests"]["backbones"][:1]
    assert [row[:2] for row in stopped["loss"][:2]] == record["loss"][:2]
    assert stopped["drift"] == [0, 0, 0]
    assert stopped["norm_log"]["steps"] == STEPS  # one that stands still has nothing to log


@pytest.mark.parametrize("arm", ["M=I", "free-M", "frozen-M", "shared-LoRA"])
def test_a_control_moves_what_it_may_and_nothing_else(arm: Any, make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, arm)
    record = run.execute()
    start = new_backbone(run.config, run.injection)
    first, last = run.backbone_after(1).load(), run.backbone_after(2).load()
    assert {
        name for name, p in first.named_parameters() if not p.equal(getattr(start, name))
    } == set(run.arm.groups)
    assert {
        name for name, p in last.named_parameters() if not p.equal(getattr(first, name))
    } == set(run.arm.groups)
    assert record["drift"][0] != 0
    if arm in ("M=I", "shared-LoRA"):
        assert last.mixing().equal(torch.eye(2).expand(2, 2, 2))
    assert (
        last.mixing().sum(-1) - 1
    ).abs().max() > 1e-5 or arm != "free-M"  # it left the doubly stochastic ones


def test_all_at_once_is_one_lora_in_as_many_steps(make: Make, tmp_path: Path) -> None:
    record = make(tmp_path, "JOINT").execute()
    assert (len(record["loss"]), record["steps"], record["drift"]) == (2, 2 * STEPS, [0, 0])
    assert list(record["digests"]["tasks"]) == ["joint"]
    assert (record["mean_drift"], record["BWT"], record["FWT"]) == (None, None, None)


def test_a_backbone_that_starts_late_or_sits_out_batches_is_not_called_dead(
    make: Make, tmp_path: Path
) -> None:
    make(tmp_path, crma={"starts_at": 0.25, "drop": 0.5, "later_scale": 0}).execute()
    crma = [line.get("crma") for line in log_of(tmp_path)]
    assert 0 < crma.count(None) < 2 * STEPS
    assert [max(line["W_norm"]) == 0 for line in crma[:STEPS] if line][:2] == [True, True]
    assert all(line is None for line in crma[STEPS:])  # later_scale 0: it stands still


def test_without_a_backbone_fresh_loras_cannot_drift_and_one_lora_does(
    make: Make, tmp_path: Path
) -> None:
    record = make(tmp_path / "frozen", "FROZEN").execute()
    assert record["drift"] == [0, 0]
    assert (record["digests"]["backbones"], record["norm_log"]) == ([], {})
    assert record["loss"][1][1] == record["loss"][0][1]
    naive = make(tmp_path / "naive", "NAIVE")
    record = naive.execute()
    assert record["drift"][0] != 0
    last = Plan([(None, naive.store.task("second").load().to("cpu", torch.float32))])
    assert record["loss"][2] == pytest.approx([loss_of(naive, t, last) for t in range(2)], abs=1e-6)
