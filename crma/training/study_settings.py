"""What the experiments of a study take from the decisions before them.

All phases after the regime share its batch size, learning rate and averaging. After the screening,
runs with a role are those of the arm that it took: "winner" is that arm, "winner_M=I" and
"winner_free-M" its controls of mixing, and "best-rival" the best rival. Every run of such an
experiment has the winner's backbone settings, so that arms without sharing, and the rank of
FROZEN-matched, are of its shape.
"""

from typing import Any

from crma.core.errors import ConfigError
from crma.training.arms import MIXING_CONTROLS, ArmName
from crma.training.ceiling import Reach
from crma.training.decision import Decisions
from crma.training.experiment import Experiment, Runs, merged
from crma.training.regime import Taken
from crma.training.screening import Screening
from crma.training.study import Phase, Study

TAKES_SCREENING = ("winner", "winner_M=I", "winner_free-M", "best-rival")


def settled(study: Study, phase: Phase, decisions: Decisions) -> Experiment:
    """The experiment of a phase, with what was decided before it; the rest as in its file.

    Raises ConfigError if the winner is an arm without controls of mixing.
    """
    experiment = study.experiments[phase.name]
    if phase.decides == "regime":
        return experiment
    for earlier in study.phases[: study.phases.index(phase)]:
        decision = decisions.get(earlier.name)
        if decision is None:
            continue
        taken = decision.taken
        if isinstance(taken, Taken):
            decay = study.experiments[earlier.name].config.get("ema", 0.0)
            changes = _shared(taken, decay)
            experiment = _with_config(experiment, changes)
        if isinstance(taken, Screening):
            experiment = _with_winner(experiment, study.experiments[earlier.name], taken)
    return experiment


def why_not(study: Study, phase: Phase, decisions: Decisions, *, regardless: bool) -> str:
    """Why a phase does not run, in words; empty: it runs, as far as is decided.

    Args:
        study: the study.
        phase: of it.
        decisions: those before it.
        regardless: run what a ceiling makes pointless, too.
    """
    extended = decisions.get(phase.extends)
    if extended is not None and isinstance(extended.taken, Taken) and extended.taken.by_rule:
        return f"{phase.extends} took a setting."
    limit = decisions.get(phase.within_reach_of)
    is_closed = limit is not None and isinstance(limit.taken, Reach) and not limit.taken.is_open
    if limit is not None and is_closed and not regardless:
        return str(limit.taken)
    taken = [each.taken for each in decisions.values() if each is not None]
    no_winner = any(isinstance(each, Screening) and each.winner is None for each in taken)
    if no_winner and study.experiments[phase.name].report == "endpoint":
        return "There is no winner to confirm."
    return ""


def waits_for(study: Study, phase: Phase, decisions: Decisions) -> tuple[str, ...]:
    """The phases before this one that have not decided yet, and on which it depends."""
    kinds: set[str | None] = set()
    if phase.decides != "regime":
        kinds.add("regime")
    if any(runs.role in TAKES_SCREENING for runs in study.experiments[phase.name].runs):
        kinds.add("screening")
    open_yet = [name for name, decision in decisions.items() if decision is None]
    named = (phase.extends, phase.within_reach_of)
    return tuple(name for name in open_yet if name in named or study.phase(name).decides in kinds)


def _shared(taken: Taken, decay: float) -> dict[str, Any]:
    setting = taken.setting
    return {
        "batch_size": setting.batch_size,
        "ema": decay if setting.averaged else 0.0,
        "lora": {"lr": setting.lr},
    }


def _with_config(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    return experiment.model_copy(update={"config": merged(experiment.config, changes)})


def _with_winner(experiment: Experiment, screened: Experiment, taken: Screening) -> Experiment:
    """An experiment whose runs with a role are those of the arms that a screening took."""
    if not any(runs.role in TAKES_SCREENING for runs in experiment.runs):
        return experiment
    rival = screened.named(taken.rival)
    winner = None if taken.winner is None else screened.named(taken.winner)
    others = [runs.name for runs in experiment.runs if runs.role not in TAKES_SCREENING]
    found: list[Runs] = []
    for runs in experiment.runs:
        if runs.role == "best-rival":
            if rival.name not in others:
                found.append(_as(runs, rival.arm, rival.name, rival.changes))
        elif runs.role not in TAKES_SCREENING:
            found.append(runs)
        elif winner is not None:
            found.append(_as_winner(runs, winner))
    experiment = experiment.model_copy(update={"runs": tuple(found)})
    return experiment if winner is None else _with_config(experiment, winner.changes)


def _as_winner(runs: Runs, winner: Runs) -> Runs:
    """The runs of the winner, or of one of its controls of mixing."""
    if runs.role == "winner":
        return _as(runs, winner.arm, winner.name, {})
    controls = MIXING_CONTROLS.get(winner.arm)
    if controls is None:
        message = f"{winner.arm} has no controls of mixing"
        raise ConfigError(message, field="arm", value=winner.arm, allowed=list(MIXING_CONTROLS))
    arm = controls.identity if runs.role == "winner_M=I" else controls.free
    return _as(runs, arm, f"{winner.name}_{runs.role.removeprefix('winner_')}", {})


def _as(runs: Runs, arm: ArmName, label: str, changes: dict[str, Any]) -> Runs:
    return runs.model_copy(update={"arm": arm, "label": label, "changes": changes})
