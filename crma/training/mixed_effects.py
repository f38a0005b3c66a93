"""A second look at the endpoint: all tasks of all seeds in one linear mixed model.

log L ~ arm + (1 | task) + (1 | seed : task), fitted by restricted maximum likelihood with
statsmodels, which comes with the extra `train`. The t-test of the endpoint decides; this says
whether it rests on a few tasks.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from crma.core.errors import ConfigError
from crma.training.endpoint import Endpoint, by_seed, missing
from crma.training.pairing import Record

ARM = "is_arm"  # the column that tells the arm from the other: 1 or 0


class Effect(NamedTuple):
    """The effect of the arm on log loss, in percent of loss; positive: the arm's is lower.

    Attributes:
        percent: the estimate.
        interval: 95 % interval.
        p: two-sided, of the Wald test.
        warnings: what statsmodels said about the fit.
    """

    percent: float
    interval: tuple[float, float]
    p: float
    warnings: tuple[str, ...]


def mixed_effects(arm: Mapping[int, Record], base: Mapping[int, Record]) -> Effect:
    """Fit the model to the prior tasks of two arms.

    Args:
        arm: seed -> record of the arm that is judged.
        base: the same of the arm that it is compared with.

    Raises:
        ConfigError: statsmodels is not installed.
    """
    pandas, statsmodels = _libraries()
    frame = pandas.DataFrame([*_rows(arm, 1), *_rows(base, 0)])
    model = statsmodels.mixedlm(
        f"log_loss ~ {ARM}",
        frame,
        groups=frame["task"],
        re_formula="1",
        vc_formula={"seed": "0 + C(seed)"},
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = model.fit(reml=True)
    low, high = fit.conf_int().loc[ARM]
    said = dict.fromkeys(str(warning.message).splitlines()[0] for warning in caught)
    return Effect(
        _percent_below(fit.params[ARM]),
        (_percent_below(high), _percent_below(low)),
        float(fit.pvalues[ARM]),
        tuple(said),
    )


def mixed_effects_line(endpoint: Endpoint, records: Sequence[Record]) -> str:
    """The effect against every arm of an endpoint, in words; empty while runs are missing."""
    if missing(endpoint, records):
        return ""
    counted = [record for record in records if record["seed"] in endpoint.seeds]
    arm = by_seed(counted, endpoint.arm)
    lines = ["Mixed model, log L ~ arm + (1 | task) + (1 | seed : task):", ""]
    for name in endpoint.against:
        try:
            effect = mixed_effects(arm, by_seed(counted, name))
        except ConfigError as error:
            return f"No mixed model: {error.message}"
        low, high = effect.interval
        said = f" ({'; '.join(effect.warnings)})" if effect.warnings else ""
        lines.append(
            f"- against {name}: {effect.percent:+.2f} % [{low:+.2f}, {high:+.2f}], "
            f"p = {effect.p:.2g}{said}"
        )
    return "\n".join(lines)


def _libraries() -> tuple[Any, Any]:
    """pandas, and statsmodels' formulas. Raises ConfigError if they are not installed."""
    try:
        import pandas
        import statsmodels.formula.api
    except ImportError:
        message = "the mixed model needs it: pip install 'crma-server[train]'"
        raise ConfigError(
            message, field="statsmodels", value="not installed", allowed="installed"
        ) from None
    return pandas, statsmodels.formula.api


def _rows(records: Mapping[int, Record], is_arm: int) -> list[dict[str, Any]]:
    rows = []
    for seed, record in records.items():
        for task, loss in zip(record["order"][:-1], record["loss"][-1][:-1], strict=True):
            rows.append({"log_loss": math.log(loss), "task": task, "seed": seed, ARM: is_arm})
    return rows


def _percent_below(effect: float) -> float:
    """By how many percent a loss lies below another, from the difference of their logarithms."""
    return float(100 * -math.expm1(effect))
