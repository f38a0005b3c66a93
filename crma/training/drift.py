"""What a matrix of losses and accuracies says of forgetting (METHOD, section 4).

Shapes: T tasks; loss[i][t] in nats per answer token and accuracy[i][t] are of task t after training stage i, row 0 the
base model. `learned[t]` is the stage after which task t is learned.
"""

from collections.abc import Sequence
from typing import Any

Matrix = Sequence[Sequence[float]]


def measures(loss: Matrix, accuracy: Matrix, learned: Sequence[int]) -> dict[str, Any]:
    """Per task, after the last stage against when it was learned; and over tasks, the usual figures.

    drift: 100 (L_{T,t} - L_{t,t}) / L_{t,t}, in percent; positive is forgetting. drift_nats: L_{T,t} - L_{t,t}.
    retained_gain: (L_{0,t} - L_{T,t}) / (L_{0,t} - L_{t,t}): 1 is all that was gained over the base model.
    mean_loss: of L_{T,t} over all tasks. ACC: mean final accuracy; BWT: mean change of accuracy of prior tasks since
    they were learned; FWT: mean accuracy of a task just before it is learned, less that of the base model (Lopez-Paz &
    Ranzato 2017); forgetting: mean fall of prior tasks from their best accuracy (Chaudhry et al. 2018). The last three
    are None where nothing is sequential.
    """
    tasks = range(len(learned))
    final, base = loss[-1], loss[0]
    at = [loss[learned[t]][t] for t in tasks]
    prior = [t for t in tasks if learned[t] < len(loss) - 1]
    before = [t for t in tasks if learned[t] > 1]

    def mean(values: Sequence[float]) -> float | None:
        return sum(values) / len(values) if values else None

    best = {t: max(accuracy[i][t] for i in range(learned[t], len(accuracy))) for t in prior}
    return {
        "drift": [100 * (final[t] - at[t]) / at[t] for t in tasks],
        "drift_nats": [final[t] - at[t] for t in tasks],
        "retained_gain": [(base[t] - final[t]) / (base[t] - at[t]) for t in tasks],
        "mean_drift": mean([100 * (final[t] - at[t]) / at[t] for t in prior]),
        "mean_loss": mean(final),
        "ACC": mean(accuracy[-1]),
        "BWT": mean([accuracy[-1][t] - accuracy[learned[t]][t] for t in prior]),
        "FWT": mean([accuracy[learned[t] - 1][t] - accuracy[0][t] for t in before]),
        "forgetting": mean([best[t] - accuracy[-1][t] for t in prior]),
    }
