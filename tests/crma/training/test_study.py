"""crma.training.study: what a study's file may say."""

from pathlib import Path

import pytest
from paths import EXPERIMENTS
from small_study import ENDPOINT

from crma.core.digests import file_digest
from crma.core.errors import ConfigError
from crma.training.study import Study, read_study

EXPERIMENT = """
name = "its-own"
endpoint = "endpoint.toml"
config = {{tasks = ["a", "b"], dtype = "float32"{config}}}
[[runs]]
arm = "MODULAR"
seeds = [0]
role = "candidate"
{changes}
"""
STUDY = """
name = "small"
endpoint = "endpoint.toml"
[[phases]]
name = "first"
experiment = "one.toml"
decides = "regime"
[[phases]]
name = "second"
experiment = "one.toml"
config.epochs = 7
{second}
"""


def small(
    folder: Path, *, second: str = "", config: str = "", changes: str = "", study: str = STUDY
) -> Study:
    (folder / "endpoint.toml").write_text(ENDPOINT)
    (folder / "one.toml").write_text(EXPERIMENT.format(config=config, changes=changes))
    (folder / "study.toml").write_text(study.format(second=second))
    return read_study(folder / "study.toml")


def test_a_phase_has_an_experiment_of_its_own_name_and_configuration(tmp_path: Path) -> None:
    study = small(tmp_path)
    assert [phase.name for phase in study.phases] == ["first", "second"]
    epochs = {name: each.config.get("epochs") for name, each in study.experiments.items()}
    assert epochs == {"first": None, "second": 7}
    assert {name: each.name for name, each in study.experiments.items()} == {
        "first": "first",
        "second": "second",
    }
    assert study.endpoint == file_digest(tmp_path / "endpoint.toml")
    with pytest.raises(ConfigError, match="no such phase"):
        study.phase("third")


@pytest.mark.parametrize(
    ("second", "field"),
    [
        ('extends = "second"', "extends"),
        ('extends = "third"', "extends"),
        ('within_reach_of = "first"', "within_reach_of"),  # it decides on no ceiling
        ('decides = "nothing"', "phases[1].decides"),
        ("odd = 1", "phases[1].odd"),
    ],
)
def test_a_phase_names_only_phases_before_it_that_decide(
    tmp_path: Path, second: str, field: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        small(tmp_path, second=second)
    assert caught.value.field == field


def test_what_does_not_fit_a_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two phases have the same name"):
        small(tmp_path, study=STUDY.replace('"second"', '"first"'))
    with pytest.raises(ConfigError, match="runs of several dtypes are no pairs"):
        small(tmp_path, changes='changes.dtype = "auto"')
    with pytest.raises(ConfigError, match="changes nothing but its backbone"):
        small(tmp_path, changes="changes.lora.lr = 1.0")


def test_every_experiment_has_the_endpoint_of_the_study(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "another.toml").write_text(ENDPOINT.replace("0.05", "0.5"))
    one = (tmp_path / "one.toml").read_text()
    for named in ('endpoint = "another.toml"', ""):
        (tmp_path / "one.toml").write_text(one.replace('endpoint = "endpoint.toml"', named))
        with pytest.raises(ConfigError, match="would not say the study's endpoint"):
            read_study(tmp_path / "study.toml")


def test_the_shipped_study_has_all_stages_in_the_order_of_their_decisions() -> None:
    study = read_study(EXPERIMENTS / "sharing.toml")
    names = [phase.name for phase in study.phases]
    assert names[:5] == ["regime", "regime-2", "ceiling", "screening", "confirm"]
    assert {"clinc-4-arms", "clinc-100-arms", "full-size"} < set(names)
    assert study.endpoint == file_digest(EXPERIMENTS / "endpoint.toml")
    # No seed is used twice for tasks of the same kind, but to extend a phase.
    seeds: dict[str, set[int]] = {}
    for phase in study.phases:
        if not phase.extends and not phase.name.startswith("clinc"):
            seeds[phase.name] = {
                seed for runs in study.experiments[phase.name].runs for seed in runs.seeds
            }
    assert sum(map(len, seeds.values())) == len(set.union(*seeds.values()))
