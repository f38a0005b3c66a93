"""crma.training.decision: decisions that are made from records, and kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from paths import EXPERIMENTS

from crma.core.digests import file_digest
from crma.core.errors import ConfigError, TrainingError
from crma.training.decision import FILE, decide, keep, record_paths
from crma.training.regime import Setting, Taken
from crma.training.study import Study, read_study


@pytest.fixture(scope="module")
def study() -> Study:
    """The shipped one; read only."""
    return read_study(EXPERIMENTS / "sharing.toml")


def write(study: Study, results: Path, phase: str, loss: dict[int, float]) -> None:
    """Records of every run of a phase of the regime, whose loss depends on the batch size."""
    configs = study.experiments[phase].planned()
    for name, path in record_paths(study, phase, results).items():
        config = configs[name].model_dump(mode="json")
        value = loss[config["batch_size"]] * (1 + config["seed"] / 10_000)
        record: dict[str, Any] = {
            "config": config,
            "mean_loss": value,
            "loss_unaveraged": [1.1 * value],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))


def test_a_regime_that_passes_needs_no_more(study: Study, tmp_path: Path) -> None:
    write(study, tmp_path, "regime", {16: 0.50, 8: 0.41, 4: 0.40})
    decision = decide(study, study.phase("regime"), tmp_path)
    assert decision.taken == Taken(Setting(8, 1e-3, averaged=True), by_rule=True)
    assert len(decision.records) == 72


def test_an_extension_decides_from_the_records_of_both(study: Study, tmp_path: Path) -> None:
    write(study, tmp_path, "regime", {16: 0.50, 8: 0.45, 4: 0.40})
    first = decide(study, study.phase("regime"), tmp_path)
    assert first.taken == Taken(Setting(4, 1e-3, averaged=True), by_rule=False)
    write(study, tmp_path, "regime-2", {2: 0.395})
    both = decide(study, study.phase("regime-2"), tmp_path)
    assert both.taken == Taken(Setting(4, 1e-3, averaged=True), by_rule=True)
    assert len(both.records) == 72 + 24
    write(study, tmp_path, "regime-2", {2: 0.2})
    still_none = decide(study, study.phase("regime-2"), tmp_path).taken
    assert still_none == Taken(Setting(2, 1e-3, averaged=True), by_rule=False)


def test_a_decision_is_kept_with_the_digests_of_its_records(study: Study, tmp_path: Path) -> None:
    write(study, tmp_path, "regime", {16: 0.50, 8: 0.41, 4: 0.40})
    decision = decide(study, study.phase("regime"), tmp_path)
    keep(decision, tmp_path)
    kept = json.loads((tmp_path / "regime" / FILE).read_text())
    assert kept["in_words"] == "Taken: batch 8, lr 0.001, averaged weights."
    assert kept["taken"]["setting"] == {"batch_size": 8, "lr": 0.001, "averaged": True}
    assert kept["endpoint"] == file_digest(EXPERIMENTS / "endpoint.toml")
    name, path = next(iter(record_paths(study, "regime", tmp_path).items()))
    assert kept["records"][name] == file_digest(path)
    keep(decision, tmp_path)  # the same again


def test_records_that_changed_under_a_decision_are_noticed(study: Study, tmp_path: Path) -> None:
    losses = {16: 0.50, 8: 0.41, 4: 0.40}
    write(study, tmp_path, "regime", losses)
    keep(decide(study, study.phase("regime"), tmp_path), tmp_path)
    write(study, tmp_path, "regime", losses | {4: 0.401})  # the same decision, from other records
    with pytest.raises(TrainingError, match="from other records") as caught:
        keep(decide(study, study.phase("regime"), tmp_path), tmp_path)
    assert caught.value.field == "records"
    write(study, tmp_path, "regime", losses | {8: 0.49, 4: 0.48})
    with pytest.raises(TrainingError, match="decided otherwise") as caught:
        keep(decide(study, study.phase("regime"), tmp_path), tmp_path)
    assert caught.value.field == "in_words"


def test_a_ceiling_of_one_seed_decides_nothing(study: Study, tmp_path: Path) -> None:
    for name, path in record_paths(study, "ceiling", tmp_path).items():
        arm, _, seed = name.rpartition("-seed")
        path.parent.mkdir(parents=True, exist_ok=True)
        one_seed = {"arm": arm, "seed": int(seed), "loss": [[1.0, 1.0]], "pairing": {"s": seed}}
        if arm == "ORACLE-loo" and seed != "20":
            one_seed["arm"] = "ORACLE"
            one_seed["seed"] = 100 + int(seed)
        path.write_text(json.dumps(one_seed))
    with pytest.raises(ConfigError, match="needs two seeds"):
        decide(study, study.phase("ceiling"), tmp_path)
