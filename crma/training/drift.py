"""Measures of forgetting, from matrices of losses and accuracies (docs/method.md, section 4).

Shapes: T tasks and N stages. `loss[i][t]` (nats per answer token) and `accuracy[i][t]` belong to
task t after stage i; row 0 is the base model. Task t is learned in stage `learned[t]`.
"""

from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float]]


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
        mean_drift, BWT, FWT and forgetting are None if nothing is sequential.
    """
    tasks = range(len(learned))
    last_stage = len(loss) - 1
    base = loss[0]
    final = loss[-1]
    when_learned = [loss[learned[t]][t] for t in tasks]
    prior = [t for t in tasks if learned[t] < last_stage]
    learned_later = [t for t in tasks if learned[t] > 1]
    drift = [100 * (final[t] - when_learned[t]) / when_learned[t] for t in tasks]
    best = {}
    for t in prior:
        best[t] = max(accuracy[i][t] for i in range(learned[t], len(accuracy)))
    return {
        "drift": drift,
        "drift_nats": [final[t] - when_learned[t] for t in tasks],
        "retained_gain": [(base[t] - final[t]) / (base[t] - when_learned[t]) for t in tasks],
        "mean_drift": _mean([drift[t] for t in prior]),
        "mean_loss": _mean(final),
        "ACC": _mean(accuracy[-1]),
        "BWT": _mean([accuracy[-1][t] - accuracy[learned[t]][t] for t in prior]),
        "FWT": _mean([accuracy[learned[t] - 1][t] - accuracy[0][t] for t in learned_later]),
        "forgetting": _mean([best[t] - accuracy[-1][t] for t in prior]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
