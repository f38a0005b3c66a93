"""A run from end to end: what each arm trains and records, and killed runs that resume.

crma.training.protocol with loop, snapshots, record and backbone_log.
"""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from crma.core.errors import TrainingError
from crma.data.examples import read_jsonl
from crma.method.backbone import Backbone
from crma.method.injection import Plan
from crma.store import publication
from crma.store.adapter_store import AdapterStore
from crma.training import record as run_record
from crma.training.initial_adapters import new_backbone
from crma.training.loop import TaskTrainer
from crma.training.protocol import Run

TASKS = ("first", "second")
STEPS = 12  # in each task
Make = Callable[..., Run]


@pytest.fixture(scope="module")
def modular(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Any]:
    """A finished run of the method, and its record; read only."""
    run = make(tmp_path_factory.mktemp("runs") / "modular")
    return run, run.execute()


def log_of(out: Path) -> list[dict[str, Any]]:
    """The step logs of both tasks, one after the other."""
    return [
        json.loads(line)
        for task in TASKS
        for line in (out / "work" / task / "log.jsonl").read_text().splitlines()
    ]


def loss_of(run: Run, t: int, plan: Plan) -> float:
    """The holdout loss of task t under a plan."""
    examples = read_jsonl(Path(run.config.tasks[t]) / "holdout.jsonl")
    return run.evaluator.measure(plan, run.evaluator.encode(examples)).loss


def losses_of(run: Run, plans: list[Plan]) -> list[float]:
    """The holdout loss of every task under its plan."""
    return [loss_of(run, t, plan) for t, plan in enumerate(plans)]


def lora_group(run: Run, task: str) -> list[Any]:
    """The published LoRA of a task, for every row of a batch."""
    return [(None, run.snapshots.store.task(task).load().to("cpu", torch.float32))]


def backbone_group(run: Run, version: str) -> list[Any]:
    """A published backbone, for every row of a batch."""
    return [(None, run.snapshots.store.backbone(version).load().folded("cpu", torch.float32))]


def test_the_record_holds_the_losses_of_the_published_snapshots(modular: tuple[Run, Any]) -> None:
    run, record = modular
    assert json.loads((run.folder / "record.json").read_text()) == record
    first, second = lora_group(run, "first"), lora_group(run, "second")
    v1, v2 = backbone_group(run, "v1"), backbone_group(run, "v2")
    plans = [
        [Plan(), Plan()],
        [Plan(first, v1), Plan([], v1)],  # the second task has no LoRA yet
        [Plan(first, v2), Plan(second, v2)],
    ]
    expected = [losses_of(run, row) for row in plans]
    assert record["loss"] == [pytest.approx(row, abs=1e-6) for row in expected]
    assert [len(row) for row in record["accuracy"]] == [2, 2, 2]
    drift = 100 * (expected[2][0] / expected[1][0] - 1)
    assert record["drift"] == [pytest.approx(drift, abs=1e-3), 0]
    assert record["drift"][0] != 0
    assert record["loss"][1][0] < record["loss"][0][0]


def test_the_record_counts_steps_and_tokens(modular: tuple[Run, Any]) -> None:
    run, record = modular
    assert record["steps"] == 2 * STEPS
    rows = [row for of_task in run.train_rows.values() for row in of_task]
    tokens_per_epoch = sum(len(row.prompt) + len(row.answer) - 1 for row in rows)
    assert record["training"]["tokens"] == 2 * tokens_per_epoch


def test_snapshots_record_their_ancestors_and_their_data(
    modular: tuple[Run, Any], data: Path
) -> None:
    run, record = modular
    published = run.snapshots.store
    digests = record["digests"]
    entries = [published.task(task) for task in TASKS]
    assert published.backbone("v2").manifest.lineage == (digests["backbones"][0],)
    assert [entry.manifest.backbone for entry in entries] == digests["backbones"]
    assert [entry.digest for entry in entries] == list(digests["tasks"].values())
    trained_on = entries[1].manifest.trained_on
    assert set(trained_on.data) == {"second/train", "second/validation", "second/holdout"}
    assert trained_on.config == run.config.model_dump(mode="json")
    assert len(list((data / "first").iterdir())) == 3  # a run writes nothing beside the data


def test_the_mixing_gradient_is_alive_and_logged_with_the_norm(modular: tuple[Run, Any]) -> None:
    run, record = modular
    log = log_of(run.folder)
    crma = [line["crma"] for line in log]
    assert [line["step"] for line in log] == 2 * list(range(STEPS))
    assert crma[0]["grad_S"] == crma[0]["moved"] == crma[0]["W_norm"] == [0.0, 0.0]
    assert all(min(line["grad_S"]) > 0 for line in crma[10:])
    assert min(crma[-1]["moved"]) > 0
    assert set(log[0]["grad_norm"]) == {"lora", "S", "R", "W", "gamma"}
    assert record["norm_log"]["steps"] == 2 * STEPS
    max_deviation = max(max(line["c_M_minus_1"]) for line in crma)
    assert record["norm_log"]["max_norm_deviation"] == max_deviation <= 1e-6


class Death(NamedTuple):
    """The moment at which the process dies: one call of a function."""

    owner: Any
    function: str
    call: int  # counted from 1
    before: bool = False  # before the call, not after it


def die(patch: pytest.MonkeyPatch, death: Death) -> None:
    """Raises KeyboardInterrupt at one call of a function."""
    real = getattr(death.owner, death.function)
    calls = count(1)

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls) != death.call:
            return real(*args, **kwargs)
        if not death.before:
            real(*args, **kwargs)
        raise KeyboardInterrupt

    patch.setattr(death.owner, death.function, dying)


DEATHS = {
    "in the first task": Death(TaskTrainer, "check_mixing_gradient", 9),
    "in the second task": Death(TaskTrainer, "check_mixing_gradient", STEPS + 8),
    "between backbone and task": Death(AdapterStore, "publish_backbone", 2),
    "before the task serves": Death(publication, "write_channels", 2, before=True),
    "before the task counts": Death(AdapterStore, "publish_task", 1),
    "before the record": Death(run_record, "hardware", 1, before=True),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_run_resumes_and_ends_with_the_same_result(
    death: str, modular: Any, make: Make, tmp_path: Path
) -> None:
    run, record = modular
    with pytest.MonkeyPatch.context() as patch:
        die(patch, DEATHS[death])
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path).execute()
    assert not (tmp_path / "record.json").exists()
    again = make(tmp_path).execute()
    for key in ("digests", "loss", "accuracy", "drift", "steps", "norm_log"):
        assert again[key] == record[key]
    assert again["training"]["tokens"] == record["training"]["tokens"]
    assert log_of(tmp_path) == log_of(run.folder)
    assert AdapterStore(tmp_path / "store").verify() == []


def test_a_run_folder_belongs_to_one_configuration(modular: tuple[Run, Any], make: Make) -> None:
    run, record = modular
    with pytest.raises(TrainingError, match="another config"):
        make(run.folder, seed=1).execute()
    assert make(run.folder).execute()["loss"] == record["loss"]  # nothing is trained again


BROKEN = [
    ({"lora": {"lr": 1e30}}, "first: loss or gradient is not finite"),
    ({"crma": {"lr": 1e-40}}, "first: the gradient of M is 0 at step 10"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_broken_run_stops_and_publishes_nothing(
    changes: Any, message: str, make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, **changes)
    with pytest.raises(TrainingError, match=message):
        run.execute()
    assert run.snapshots.store.task_names() == ()


def test_a_stopped_backbone_keeps_every_bit_of_the_first_task_and_nothing_drifts(
    modular: Any, make: Make, tmp_path: Path
) -> None:
    _, record = modular
    stopped = make(tmp_path, "MODULAR-stop", tasks=(*TASKS, "third")).execute()
    assert stopped["digests"]["backbones"] == 3 * record["digests"]["backbones"][:1]
    assert [row[:2] for row in stopped["loss"][:2]] == record["loss"][:2]
    assert stopped["drift"] == [0, 0, 0]
    assert stopped["norm_log"]["steps"] == STEPS  # a backbone that stands still is not logged


def moved(before: Backbone, after: Backbone) -> set[str]:
    """The names of the parameters that differ."""
    return {
        name for name, value in after.named_parameters() if not value.equal(getattr(before, name))
    }


@pytest.mark.parametrize("arm", ["M=I", "free-M", "frozen-M", "shared-LoRA"])
def test_a_control_trains_its_own_groups_and_nothing_else(
    arm: str, make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, arm)
    record = run.execute()
    start = new_backbone(run.config, run.injection)
    first = run.snapshots.backbone_after(1).load()
    last = run.snapshots.backbone_after(2).load()
    assert moved(start, first) == set(run.arm.groups)
    assert moved(first, last) == set(run.arm.groups)
    assert record["drift"][0] != 0
    if arm in ("M=I", "shared-LoRA"):
        assert last.mixing().equal(torch.eye(2).expand(2, 2, 2))
    if arm == "free-M":  # nothing keeps it doubly stochastic
        assert (last.mixing().sum(-1) - 1).abs().max() > 1e-5


def test_joint_training_is_one_lora_in_as_many_steps(make: Make, tmp_path: Path) -> None:
    record = make(tmp_path, "JOINT").execute()
    assert (len(record["loss"]), record["steps"], record["drift"]) == (2, 2 * STEPS, [0, 0])
    assert list(record["digests"]["tasks"]) == ["joint"]
    assert (record["mean_drift"], record["BWT"], record["FWT"]) == (None, None, None)


def test_a_backbone_that_starts_late_or_skips_batches_is_not_reported_dead(
    make: Make, tmp_path: Path
) -> None:
    make(tmp_path, crma={"starts_at": 0.25, "drop": 0.5, "later_scale": 0}).execute()
    crma = [line.get("crma") for line in log_of(tmp_path)]
    assert 0 < crma.count(None) < 2 * STEPS
    in_first_task = [line for line in crma[:STEPS] if line]
    assert [max(line["W_norm"]) for line in in_first_task[:2]] == [0, 0]
    assert all(line is None for line in crma[STEPS:])  # later_scale 0: the backbone stands still


def test_without_a_backbone_fresh_loras_cannot_drift(make: Make, tmp_path: Path) -> None:
    record = make(tmp_path, "FROZEN").execute()
    assert record["drift"] == [0, 0]
    assert (record["digests"]["backbones"], record["norm_log"]) == ([], {})
    assert record["loss"][1][1] == record["loss"][0][1]


def test_one_lora_for_all_tasks_drifts(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, "NAIVE")
    record = run.execute()
    assert record["drift"][0] != 0
    last = Plan(lora_group(run, "second"))
    expected = losses_of(run, [last, last])
    assert record["loss"][2] == pytest.approx(expected, abs=1e-6)
