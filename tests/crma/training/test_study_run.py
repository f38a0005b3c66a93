"""crma.training.study_run: phase after phase, resumed, divided, and no pairs of two machines."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import crma
from small_study import ENDPOINT

from crma.core.errors import DataError, TrainingError
from crma.core.files import locked
from crma.models.base_model import BaseModel
from crma.training.study import Study, read_study
from crma.training.study_report import forecast, study_report
from crma.training.study_run import Conduct

GRID = """
name = "grid"
endpoint = "endpoint.toml"
report = "regime"
config = {{tasks = ["{task}"], model = "{model}", dtype = "float32", epochs = 1, ema = 0.9}}
runs = [
    {{arm = "FROZEN", label = "b6", seeds = [0, 1], changes.batch_size = 6}},
    {{arm = "FROZEN", label = "b3", seeds = [0, 1], changes.batch_size = 3}},
]
"""
LATER = """
name = "later"
endpoint = "endpoint.toml"
config = {{tasks = ["{task}"], model = "{model}", dtype = "float32", epochs = 1}}
runs = [{{arm = "FROZEN", seeds = [5]}}]
"""
STUDY = """
name = "two"
endpoint = "endpoint.toml"
phases = [
    {name = "grid", experiment = "grid.toml", decides = "regime"},
    {name = "later", experiment = "later.toml"},
]
"""


@pytest.fixture
def file(base: BaseModel, write_task: Callable[..., None], tmp_path: Path) -> Path:
    """A study of two phases: four runs, and one that is set by what they decide."""
    write_task(tmp_path / "own", ("yes", "no"))
    (tmp_path / "endpoint.toml").write_text(ENDPOINT)
    for name, text in {"grid": GRID, "later": LATER}.items():
        filled = text.format(task=tmp_path / "own", model=base.path)
        (tmp_path / f"{name}.toml").write_text(filled)
    (tmp_path / "study.toml").write_text(STUDY)
    return tmp_path / "study.toml"


def run(
    file: Path, *, together: int = 1, only: str = "*", until: str = "", work: str = "work"
) -> list[str]:
    """The phases that were done."""
    results, folder = file.parent / "results", file.parent / work
    study = read_study(file)
    conduct = Conduct(
        study, results, folder, 1, together, only, until, False, True, lambda *_: None
    )
    return list(conduct.run())


def made(file: Path) -> set[str]:
    results = file.parent / "results"
    return {str(path.relative_to(results)) for path in results.rglob("*.json")}


GRID_RUNS = {f"grid/{label}-seed{seed}.json" for label in ("b6", "b3") for seed in (0, 1)}


def states(study: Study, results: Path) -> dict[str, tuple[int, str]]:
    found = forecast(study, results, regardless=False)
    return {each.phase: (each.missing, each.state) for each in found}


def test_a_later_phase_is_set_by_what_an_earlier_one_decided(file: Path) -> None:
    study, results = read_study(file), file.parent / "results"
    assert study_report(study, results) == "No run of this study has been made yet."
    assert states(study, results) == {"grid": (4, "ready"), "later": (1, "waits for grid")}
    assert run(file) == ["grid", "later"]
    assert made(file) == GRID_RUNS | {"grid/decision.json", "later/FROZEN-seed5.json"}
    taken = json.loads((results / "grid/decision.json").read_text())["taken"]["setting"]
    config = json.loads((results / "later/FROZEN-seed5.json").read_text())["config"]
    assert (config["batch_size"], config["lora"]["lr"]) == (taken["batch_size"], taken["lr"])
    assert states(study, results) == {"grid": (0, "done"), "later": (0, "done")}
    text = study_report(study, results)
    assert "### grid\n\n4 of 4 runs; seeds 0 to 1; float32 on " in text
    assert f"endpoint `{study.endpoint}`." in text
    decided = json.loads((results / "grid/decision.json").read_text())["in_words"]
    assert text.count(decided) == 1


def test_runs_that_train_together_make_the_same_records(file: Path) -> None:
    assert run(file, together=2) == ["grid", "later"]
    joint = {name: json.loads((file.parent / "results" / name).read_text()) for name in GRID_RUNS}
    for name in GRID_RUNS:
        (file.parent / "results" / name).unlink()
    (file.parent / "results/grid/decision.json").unlink()
    assert run(file, until="grid", work="other") == ["grid"]
    for name, record in joint.items():
        alone = json.loads((file.parent / "results" / name).read_text())
        assert record["pairing"] == alone["pairing"]
        assert record["loss"][-1] == pytest.approx(alone["loss"][-1], rel=1e-4)


def test_a_phase_has_its_tables_until_one_that_extends_it_is_done(file: Path) -> None:
    grid = (file.parent / "grid.toml").read_text().replace("seeds = [0, 1]", "seeds = [0]")
    (file.parent / "grid.toml").write_text(grid)  # with one seed, no setting passes
    for old, new in {"grid": "more", "b6": "b2", "b3": "b1", "= 6": "= 2", "= 3": "= 1"}.items():
        grid = grid.replace(old, new)
    (file.parent / "more.toml").write_text(grid)
    more = '{name = "more", experiment = "more.toml", decides = "regime", extends = "grid"},'
    text = file.read_text().replace('    {name = "later"', f'    {more}\n    {{name = "later"')
    file.write_text(text)
    study, results = read_study(file), file.parent / "results"
    assert run(file, until="grid") == ["grid"]
    assert run(file, only="b2-*") == ["grid"]
    assert study_report(study, results).count("| batch |") == 1
    assert run(file, until="more", work="other") == ["grid", "more"]
    assert study_report(study, results).count("| batch |") == 1


def test_a_study_resumes_and_ends_where_it_is_told(file: Path) -> None:
    assert run(file, until="grid") == ["grid"]
    before = (file.parent / "results/grid/b6-seed0.json").stat().st_mtime_ns
    (file.parent / "results/grid/b3-seed1.json").unlink()
    (file.parent / "results/grid/decision.json").unlink()
    assert run(file) == ["grid", "later"]
    assert (file.parent / "results/grid/b6-seed0.json").stat().st_mtime_ns == before


def test_machines_that_divide_a_phase_wait_for_each_other(file: Path) -> None:
    assert run(file, only="*-seed0") == []
    assert made(file) == {name for name in GRID_RUNS if "seed0" in name}
    text = study_report(read_study(file), file.parent / "results")
    assert text.startswith("### grid\n\n2 of 4 runs; ")
    assert "|" not in text  # no table before all runs are there
    assert run(file, only="*-seed1", work="other") == ["grid"]
    assert made(file) == GRID_RUNS | {"grid/decision.json"}


def test_runs_of_two_classes_of_machine_are_not_mixed(file: Path) -> None:
    run(file, until="grid")
    path = file.parent / "results/grid/b6-seed1.json"
    record = json.loads(path.read_text())
    record["pairing"]["machine"]["cpu"] = "another"
    path.write_text(json.dumps(record))
    (file.parent / "results/grid/b3-seed1.json").unlink()
    with pytest.raises(TrainingError, match="two classes are no pair") as caught:
        run(file)
    assert caught.value.field == "b6-seed1"
    assert not (file.parent / "results/grid/b3-seed1.json").exists()
    path.unlink()
    (file.parent / "results/grid/decision.json").unlink()
    assert run(file, until="grid") == ["grid"]


def of_another_class(*paths: Path) -> None:
    """Make records those of another machine."""
    for path in paths:
        record = json.loads(path.read_text())
        record["pairing"]["machine"]["cpu"] = "another"
        path.write_text(json.dumps(record))


def test_another_class_is_refused_before_any_phase_begins(file: Path) -> None:
    frozen = '{arm = "FROZEN", seeds = [5]}'
    last = (file.parent / "later.toml").read_text().replace('"later"', '"last"')
    last = last.replace(frozen, f'{frozen}, {{arm = "NAIVE", seeds = [5]}}')
    (file.parent / "last.toml").write_text(last)
    added = '    {name = "last", experiment = "last.toml"},\n]'
    file.write_text(file.read_text().replace("]\n", f"{added}\n"))
    run(file)
    results = file.parent / "results"
    of_another_class(results / "last/FROZEN-seed5.json")
    (results / "last/NAIVE-seed5.json").unlink()
    (results / "later/FROZEN-seed5.json").unlink()
    with pytest.raises(TrainingError, match=r"1 records .* \(--fresh-class\)"):
        run(file)
    assert not (results / "later/FROZEN-seed5.json").exists()
    assert run(file, until="later") == ["grid", "later"]


def test_records_of_another_class_are_dropped_on_demand_and_made_here(file: Path) -> None:
    run(file, until="grid")
    grid = file.parent / "results/grid"
    of_another_class(grid / "b6-seed0.json", grid / "b6-seed1.json")
    (grid / "b3-seed1.json").unlink()
    (grid / "decision.json").unlink()
    kept = (grid / "b6-seed0.json").read_bytes()  # its seed has no missing run
    folders = ("--results", grid.parent, "--work", file.parent / "work")
    code, _, err = crma("study", file, *folders)
    assert (code, "--fresh-class" in err) == (1, True)
    code, _, err = crma("study", file, *folders, "--until", "grid", "--fresh-class")
    assert code == 0, err
    assert "dropped" in err
    assert (grid / "b6-seed0.json").read_bytes() == kept
    made_here = json.loads((grid / "b6-seed1.json").read_text())
    assert made_here["pairing"]["machine"]["cpu"] != "another"


def test_no_record_is_dropped_where_data_are_missing(file: Path) -> None:
    run(file, until="grid")
    grid = file.parent / "results/grid"
    of_another_class(grid / "b6-seed1.json")
    (grid / "b3-seed1.json").unlink()
    (grid / "decision.json").unlink()
    later = file.parent / "later.toml"
    later.write_text(later.read_text().replace("/own", "/absent"))
    folders = ("--results", grid.parent, "--work", file.parent / "work")
    code, _, err = crma("study", file, *folders, "--fresh-class")
    assert code != 0
    assert "absent" in err
    assert (grid / "b6-seed1.json").exists()


def test_machines_may_divide_a_phase_by_seeds(file: Path) -> None:
    """A pair has one seed."""
    run(file, until="grid")
    grid = file.parent / "results/grid"
    of_another_class(grid / "b6-seed0.json", grid / "b3-seed0.json")
    (file.parent / "results/grid/b3-seed1.json").unlink()
    (file.parent / "results/grid/decision.json").unlink()
    assert run(file, until="grid") == ["grid"]


def test_a_later_phase_may_run_on_another_machine(file: Path) -> None:
    run(file, until="grid")
    results = file.parent / "results"
    of_another_class(*(results / "grid").glob("*-seed*.json"))
    (results / "grid/decision.json").unlink()
    assert run(file) == ["grid", "later"]


def test_two_processes_do_not_run_one_study(file: Path) -> None:
    with locked(file.parent / "work"), pytest.raises(TrainingError, match="another process"):
        run(file)


def test_data_that_a_later_phase_misses_is_missed_at_once(file: Path) -> None:
    later = (file.parent / "later.toml").read_text()
    (file.parent / "later.toml").write_text(later.replace("/own", "/absent"))
    with pytest.raises(DataError, match="absent"):
        run(file)
    assert not made(file)
    assert run(file, until="grid") == ["grid"]


def test_the_command_prints_the_tables_and_writes_them_after_each_phase(file: Path) -> None:
    folders = ("--results", file.parent / "results", "--work", file.parent / "work")
    code, out, err = crma("study", file, *folders, "--dry-run")
    assert (code, "later" in out, made(file)) == (0, True, set())
    code, out, err = crma("study", file, *folders)
    assert code == 0, err
    assert (file.parent / "results" / "two.md").read_text() == out
    assert "### later" in out
    assert "grid is done" in err
    code, _, err = crma("study", file, *folders, "--until", "nowhere")
    assert (code, "no such phase" in err) == (2, True)
