"""crma.training.study_settings: what later phases take from the decisions before them."""

from pathlib import Path

import pytest
from paths import EXPERIMENTS

from crma.core.errors import ConfigError
from crma.training.ceiling import Reach
from crma.training.decision import Decision, Decisions, Rule
from crma.training.experiment import Experiment
from crma.training.regime import Setting, Taken
from crma.training.screening import Screening
from crma.training.study import Study, read_study
from crma.training.study_settings import settled, waits_for, why_not

REGIME = Taken(Setting(8, 3e-3, averaged=True), by_rule=True)
NONE_PASSED = Taken(Setting(4, 1e-3, averaged=True), by_rule=False)
CLOSED, OPEN = Reach("PRIVATE", 1.0), Reach("PRIVATE", 3.0)


@pytest.fixture(scope="module")
def study() -> Study:
    """The shipped one; read only."""
    return read_study(EXPERIMENTS / "sharing.toml")


def decided(study: Study, **taken: Rule | None) -> Decisions:
    """Phase -> what it decided; None: not yet."""
    return {
        name: None if rule is None else Decision(study.phase(name), rule, study.endpoint, {})
        for name, rule in taken.items()
    }


def screened(study: Study, winner: str | None, rival: str = "FROZEN-warm-mean") -> Decisions:
    return decided(study, regime=REGIME, screening=Screening(winner, rival))


def of_phase(study: Study, name: str, decisions: Decisions) -> Experiment:
    return settled(study, study.phase(name), decisions)


def test_all_later_phases_share_what_the_regime_took(study: Study) -> None:
    for phase in study.phases:
        if phase.decides == "regime":
            continue
        for name, config in settled(study, phase, decided(study, regime=REGIME)).planned().items():
            found = (config.batch_size, config.lora.lr, config.ema)
            assert found == (8, 3e-3, 0.9), name
            assert config.lora.alpha / config.lora.rank == 2


def test_the_weights_after_the_last_step_are_not_averaged(study: Study) -> None:
    taken = Taken(Setting(8, 3e-3, averaged=False), by_rule=True)
    ceiling = of_phase(study, "ceiling", decided(study, regime=taken))
    assert {config.ema for config in ceiling.planned().values()} == {0.0}


def test_a_regime_that_goes_on_with_smaller_batches_counts_for_all(study: Study) -> None:
    decisions = decided(study, regime=NONE_PASSED)
    assert why_not(study, study.phase("regime-2"), decisions, regardless=False) == ""
    extended = Taken(Setting(2, 2e-3, averaged=True), by_rule=True)
    both = decided(study, **{"regime": NONE_PASSED, "regime-2": extended})
    sizes = {config.batch_size for config in of_phase(study, "ceiling", both).planned().values()}
    assert sizes == {2}
    grid = {
        config.batch_size for config in of_phase(study, "regime-2", decisions).planned().values()
    }
    assert grid == {2}  # the grid itself stays
    passed = decided(study, regime=REGIME)
    assert "took a setting" in why_not(study, study.phase("regime-2"), passed, regardless=False)


WINNERS = {
    "MODULAR_later-x0.15": ("MODULAR", "M=I", "free-M"),
    "MODULAR_later-M_gate": ("MODULAR", "M=I", "free-M"),
    "SLOW-FAST": ("SLOW-FAST", "SLOW-FAST_M=I", "SLOW-FAST_free-M"),
    "NULL-SPACE": ("NULL-SPACE", "NULL-SPACE_M=I", "NULL-SPACE_free-M"),
}


def test_every_candidate_can_win(study: Study) -> None:
    runs = study.experiments["screening"].runs
    assert {each.name for each in runs if each.role == "candidate"} == WINNERS.keys()


@pytest.mark.parametrize("winner", WINNERS)
def test_the_winner_is_confirmed_with_its_controls_and_its_backbone(
    study: Study, winner: str
) -> None:
    confirm = of_phase(study, "confirm", screened(study, winner))
    endpoint = confirm.judged_by()
    assert endpoint is not None
    arm, identity, free = WINNERS[winner]
    assert endpoint.arm == arm
    assert endpoint.digest == study.endpoint
    arms = {runs.name: runs.arm for runs in confirm.runs}
    assert arms[winner] == arm
    assert arms[f"{winner}_M=I"] == identity
    assert arms[f"{winner}_free-M"] == free
    assert arms["FROZEN-warm-mean"] == "FROZEN-warm-mean"
    planned = confirm.planned()
    assert len(planned) == 7 * 24
    wanted = study.experiments["screening"].planned()[f"{winner}-seed40"].crma
    assert {config.crma for config in planned.values()} == {wanted}


def test_the_best_rival_keeps_its_rank(study: Study) -> None:
    decisions = screened(study, "SLOW-FAST", "FROZEN-warm-last_rank-13")
    config = of_phase(study, "confirm", decisions).planned()["FROZEN-warm-last_rank-13-seed100"]
    assert (config.arm, config.lora.rank, config.lora.alpha) == ("FROZEN-warm-last", 13, 26.0)


def test_a_rival_that_the_endpoint_judges_anyway_runs_once(study: Study) -> None:
    confirm = of_phase(study, "confirm", screened(study, "SLOW-FAST", "FROZEN-matched"))
    assert len(confirm.planned()) == 6 * 24


def test_without_a_winner_nothing_is_confirmed_and_its_runs_are_left_out(study: Study) -> None:
    decisions = screened(study, None)
    confirm = study.phase("confirm")
    assert "no winner" in why_not(study, confirm, decisions, regardless=False)
    assert "no winner" in why_not(study, confirm, decisions, regardless=True)
    for name in ("clinc-4-arms", "full-size"):
        assert why_not(study, study.phase(name), decisions, regardless=False) == ""
        runs = of_phase(study, name, decisions).runs
        assert "PRIVATE" in {each.arm for each in runs}
        assert "MODULAR" not in {each.arm for each in runs}


def test_a_closed_ceiling_ends_what_looks_for_it_on_the_same_tasks(study: Study) -> None:
    decisions = decided(study, **{"ceiling": CLOSED, "clinc-4": OPEN})
    reasons = {
        name: why_not(study, study.phase(name), decisions, regardless=False)
        for name in ("confirm", "full-size", "screening", "clinc-4-arms", "clinc-100")
    }
    assert "can reach 2 % on these tasks" in reasons["confirm"]
    assert "can reach 2 % on these tasks" in reasons["full-size"]
    assert not reasons["screening"]  # other tasks need its winner
    assert not reasons["clinc-4-arms"]
    assert not reasons["clinc-100"]
    assert why_not(study, study.phase("confirm"), decisions, regardless=True) == ""


def test_a_phase_waits_only_for_what_it_takes(study: Study) -> None:
    decisions = decided(study, regime=None, ceiling=None, screening=None)
    waiting = {
        name: waits_for(study, study.phase(name), decisions)
        for name in ("regime-2", "ceiling", "confirm", "clinc-4")
    }
    assert waiting == {
        "regime-2": ("regime",),
        "ceiling": ("regime",),
        "confirm": ("regime", "ceiling", "screening"),
        "clinc-4": ("regime",),
    }
    # Nothing is taken from what is not decided: the file stands.
    assert of_phase(study, "ceiling", decisions) == study.experiments["ceiling"]


def test_a_winner_without_controls_of_mixing_is_refused(study: Study, tmp_path: Path) -> None:
    for path in EXPERIMENTS.glob("*.toml"):
        (tmp_path / path.name).write_text(path.read_text())
    text = (tmp_path / "screening.toml").read_text()
    text = text.replace('arm = "SLOW-FAST"', 'arm = "frozen-M"')
    (tmp_path / "screening.toml").write_text(text)
    odd = read_study(tmp_path / "sharing.toml")
    with pytest.raises(ConfigError, match="frozen-M has no controls of mixing"):
        of_phase(odd, "confirm", screened(odd, "frozen-M"))
