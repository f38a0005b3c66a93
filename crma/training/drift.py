"""Measures of forgetting, from matrices of losses and accuracies (docs/method.md, section 4).

Shapes: T tasks and N stages. `loss[i][t]` (nats per answer token) and `accuracy[i][t]` belong to
task t after stage i; row 0 is the base model. Task t is learned in stage `learned[t]`. Of a matrix
that was not measured whole, L_{t,t} and L_{T,t} are known; the other cells are None.
"""

from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float | None]]


def measures(loss: Matrix, accuracy: Matrix, learned: Sequence[int]) -> dict[str, Any]:
    """Compare every task after the last stage with the same task when it was learned.

    Notation: L_{0,t} is the base model's loss on task t, L_{t,t} the loss when t was learned, and
    L_{T,t} the final loss.

    Args:
        loss: N + 1 rows of T.
        accuracy: N + 1 rows of T.
        learned: T stages.

    Returns:
        drift: per task, 100 (L_{T,t} - L_{t,t}) / L_{t,t} in percent; positive is forgetting.
        drift_nats: per task, L_{T,t} - L_{t,t}.
        retained_gain: per task, (L_{0,t} - L_{T,t}) / (L_{0,t} - L_{t,t}); 1 means that the whole
            gain over the base model is left.
        mean_drift: mean drift of the prior tasks, those learned before the last stage.
        mean_loss: mean of L_{T,t} over all tasks.
        ACC: mean final accuracy.
        BWT: mean change in accuracy of prior tasks since they were learned.
        FWT: mean accuracy of a task just before it is learned, minus that of the base model
            (Lopez-Paz & Ranzato 2017).
        forgetting: mean fall of prior tasks from their best accuracy (Chaudhry et al. 2018).
        mean_drift, BWT, FWT and forgetting are None if nothing is sequential; FWT, forgetting and
        the values of retained_gain also where a cell that they need was not measured.
    """
    tasks = range(len(learned))
    last_stage = len(loss) - 1
    base, final = loss[0], _known(loss[-1])
    when_learned = _known([loss[learned[t]][t] for t in tasks])
    prior = [t for t in tasks if learned[t] < last_stage]
    learned_later = [t for t in tasks if learned[t] > 1]
    drift = [100 * (final[t] - when_learned[t]) / when_learned[t] for t in tasks]
    best: dict[int, float | None] = {}
    for t in prior:
        since = [accuracy[i][t] for i in range(learned[t], len(accuracy))]
        best[t] = None if None in since else max(_known(since))
    retained = [_ratio(_minus(base[t], final[t]), _minus(base[t], when_learned[t])) for t in tasks]
    transfer = [_minus(accuracy[learned[t] - 1][t], accuracy[0][t]) for t in learned_later]
    return {
        "drift": drift,
        "drift_nats": [final[t] - when_learned[t] for t in tasks],
        "retained_gain": retained,
        "mean_drift": _mean([drift[t] for t in prior]),
        "mean_loss": _mean(final),
        "ACC": _mean(accuracy[-1]),
        "BWT": _mean([_minus(accuracy[-1][t], accuracy[learned[t]][t]) for t in prior]),
        "FWT": _mean(transfer),
        "forgetting": _mean([_minus(best[t], accuracy[-1][t]) for t in prior]),
    }


def _known(values: Sequence[float | None]) -> list[float]:
    """The values, all of which were measured. Raises TypeError if one was not."""
    return [float(value) for value in values]  # type: ignore[arg-type]


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one / other


def _mean(values: Sequence[float | None]) -> float | None:
    """None if there is no value, or one that was not measured."""
    if not values or None in values:
        return None
    return sum(_known(values)) / len(values)
