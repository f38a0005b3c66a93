"""What a run records beside its matrix: losses by question, pairing, averaged weights, reserve."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.training.pairing import check_paired, is_paired
from crma.training.protocol import Run

Make = Callable[..., Run]
Record = dict[str, Any]


@pytest.fixture(scope="module")
def whole(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The record of a run of the method with its whole matrix; read only."""
    return make(tmp_path_factory.mktemp("runs") / "whole").execute()


def test_the_loss_of_a_task_is_that_of_its_questions(whole: Record) -> None:
    for t, task in enumerate(("first", "second")):
        items = whole["items"][task]
        assert [len(items[key]) for key in ("tokens", "learned", "final")] == [12, 12, 12]
        tokens = sum(items["tokens"])
        assert sum(items["learned"]) / tokens == pytest.approx(whole["loss"][t + 1][t], rel=1e-5)
        assert sum(items["final"]) / tokens == pytest.approx(whole["loss"][2][t], rel=1e-5)
    assert whole["items"]["first"]["learned"] != whole["items"]["first"]["final"]


def test_a_screening_run_measures_a_task_when_learned_and_at_the_end(
    whole: Record, make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, matrix=False)
    measured = []
    real = type(run.evaluator).measure_items

    def counting(*arguments: Any) -> Any:
        measured.append(arguments)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.evaluator), "measure_items", counting)
        record = run.execute()
    assert len(measured) == 3  # the last task is measured once
    L_11, L_21 = whole["loss"][1][0], whole["loss"][2][0]
    L_22 = whole["loss"][2][1]
    assert record["loss"] == [[None, None], [L_11, None], [L_21, L_22]]
    for key in ("drift", "drift_nats", "mean_drift", "mean_loss", "ACC", "BWT", "items"):
        assert record[key] == whole[key]
    assert (record["FWT"], record["retained_gain"]) == (None, [None, None])
    assert record["forgetting"] == whole["forgetting"]  # one later stage only


def test_without_a_backbone_a_screening_run_measures_every_task_once(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, "FROZEN", tasks=("first", "second", "third"), matrix=False)
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        real = type(run.evaluator).measure_items
        patch.setattr(
            type(run.evaluator), "measure_items", lambda *each: plans.append(1) or real(*each)
        )
        record = run.execute()
    assert len(plans) == 3
    assert record["drift"] == [0, 0, 0]
    assert record["forgetting"] is None


def test_averaged_weights_are_published_and_the_last_are_measured_too(
    make: Make, tmp_path: Path
) -> None:
    last = make(tmp_path / "last", "FROZEN").execute()
    averaged = make(tmp_path / "averaged", "FROZEN", ema=0.9).execute()
    assert "loss_unaveraged" not in last
    when_learned = [last["loss"][t + 1][t] for t in range(2)]
    assert averaged["loss_unaveraged"] == pytest.approx(when_learned, rel=1e-6)
    assert averaged["digests"]["tasks"] != last["digests"]["tasks"]
    assert averaged["loss"][2] != pytest.approx(last["loss"][2], rel=1e-6)


def test_a_backbone_is_averaged_with_its_lora_and_goes_on_from_there(
    make: Make, tmp_path: Path
) -> None:
    averaged = make(tmp_path / "averaged", "MODULAR-stop", ema=0.5).execute()
    last = make(tmp_path / "last", "MODULAR-stop").execute()
    assert averaged["digests"]["backbones"] != last["digests"]["backbones"]
    assert len(set(averaged["digests"]["backbones"])) == 1  # averaging moves nothing that stands
    assert averaged["drift"] == [0, 0]
    again = make(tmp_path / "averaged", "MODULAR-stop", ema=0.5).execute()  # all is on the disk
    assert again["loss_unaveraged"] == averaged["loss_unaveraged"]


def test_arms_of_different_ranks_begin_with_the_same_rows(make: Make, tmp_path: Path) -> None:
    """FROZEN-matched had another A than FROZEN, and its log-ratio a standard deviation of 12 %."""
    small, large = (
        make(tmp_path / arm, arm, lora={"drawn_rank": 40}).stage_trainer.start_lora(0)
        for arm in ("FROZEN", "FROZEN-matched")
    )
    assert (small.config.rank, large.config.rank > 2) == (2, True)
    assert small.config.scaling == large.config.scaling
    for path, pair in small.pairs.items():
        assert pair.A.equal(large.pairs[path].A[:2])
    too_small = make(tmp_path / "too_small", "FROZEN-matched", lora={"drawn_rank": 2})
    with pytest.raises(ConfigError, match="smaller rank") as caught:
        too_small.stage_trainer.start_lora(0)
    assert caught.value.field == "lora.drawn_rank"


def test_a_record_says_what_its_run_shares_with_others(whole: Record) -> None:
    pairing = whole["pairing"]
    assert pairing["order"] == ["first", "second"]
    assert (pairing["lora.lr"], pairing["lora.scaling"]) == (5e-3, 2.0)
    assert (pairing["lora.drawn_rank"], pairing["dtype"]) == (2, "float32")
    assert set(pairing["machine"]) == {"cpu", "capability", "gpu"}
    assert pairing["data"] == whole["digests"]["data"]
    assert json.loads(json.dumps(pairing)) == pairing


DIFFERENT = {
    "seed": 1,
    "order": ["second", "first"],
    "lora.lr": 1e-3,
    "lora.scaling": 1.0,
    "lora.drawn_rank": 8,
    "dtype": "bfloat16",
    "machine": {"cpu": "another", "capability": "AVX2", "gpu": None},
    "batch_size": 16,
    "ema": 0.9,
    "data": {},
}


@pytest.mark.parametrize("field", DIFFERENT)
def test_runs_that_differ_in_more_than_the_arm_are_not_compared(field: str, whole: Record) -> None:
    other = {**whole, "arm": "FROZEN", "pairing": {**whole["pairing"], field: DIFFERENT[field]}}
    with pytest.raises(ConfigError, match="differ in more than the arm") as caught:
        check_paired(whole, other)
    assert caught.value.field == field
    assert (caught.value.value, caught.value.allowed) == (
        DIFFERENT[field],
        whole["pairing"][field],
    )
    assert not is_paired(whole, other)


def test_a_record_of_an_earlier_version_is_not_compared(whole: Record) -> None:
    old = {key: value for key, value in whole.items() if key != "pairing"}
    with pytest.raises(ConfigError, match="run it again", check=lambda e: e.field == "pairing"):
        check_paired(whole, old)
    check_paired(whole, whole)


def test_holdout_and_reserve_are_asked_together(
    make: Make, data: Path, write_task: Any, tmp_path: Path
) -> None:
    write_task(tmp_path / "own", ("yes", "no"))
    line = {"prompt": "Something else?", "completion": "yes"}
    (tmp_path / "own" / "reserve.jsonl").write_text(json.dumps(line) + "\n")
    run = make(tmp_path / "run", "FROZEN", tasks=[tmp_path / "own"], measure="holdout+reserve")
    record = run.execute()
    assert len(record["items"]["own"]["final"]) == 13
    digests = record["digests"]["data"][str(tmp_path / "own")]
    assert list(digests) == ["train", "validation", "holdout", "reserve"]


def test_a_run_that_an_older_version_began_gets_its_record(make: Make, tmp_path: Path) -> None:
    """Its logs do not say which steps were played from a recording: none was."""
    run = make(tmp_path, matrix=False)
    run.execute()
    for file in run.stage_trainer.logs():
        steps = [json.loads(line) for line in file.read_text().splitlines()]
        for step in steps:
            del step["recorded"]
        file.write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    record = make(tmp_path, matrix=False).execute()
    assert record["training"]["recorded_steps"] == 0
