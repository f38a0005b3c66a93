"""The endpoint that was written down before any run was measured on it, and its verdict.

`crma/experiments/endpoint.toml` is the file; every record that is to count holds its digest. The
figure is the paper's: the loss of *prior* tasks after the last one was learned.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field

from crma.core.digests import file_digest
from crma.core.errors import ConfigError
from crma.core.json_lines import checked
from crma.evaluation.statistics import detectable_mean, t_interval, t_test, tost
from crma.training.arms import ArmName
from crma.training.config import Measured, Settings, read_toml
from crma.training.pairing import Record, check_paired

Orders = tuple[tuple[str, ...], ...]
WINNER = "winner"  # in the place of an arm: the one that screening takes


class Endpoint(Settings):
    """The content of an endpoint's file.

    Attributes:
        name: of the endpoint.
        arm: the arm that is judged; "winner": the one that screening took, which the experiment
            names.
        against: the arms that it has to beat, in this order: one is tested only if it beat all
            those before.
        measure: the split.
        seeds: of every arm.
        orders: of the tasks; a seed has the one whose place is the remainder of its division by
            their number.
        alpha: of each two-sided test. A fixed sequence needs no correction.
        drift_margin: percent of loss, for the mean drift.
        worst_drift: percent of loss, for the mean over seeds of any task's drift.
        digest: of the file.
    """

    name: str = Field(pattern=r"^[\w-]+$")
    arm: ArmName | Literal["winner"]
    against: tuple[ArmName, ...] = Field(min_length=1)
    measure: Measured
    seeds: tuple[int, ...] = Field(min_length=2)
    orders: Orders = Field(min_length=1)
    alpha: float = Field(gt=0, lt=1)
    drift_margin: float = Field(gt=0)
    worst_drift: float = Field(gt=0)
    digest: str = ""


class Comparison(NamedTuple):
    """One arm against another.

    Attributes:
        against: the other arm.
        by_seed: seed -> d_s, in percent; positive: the arm's loss is lower.
        interval: 95 % t-interval of the mean.
        p: of a two-sided t-test against 0.
        claimed: the arm is better, here and in every comparison before.
    """

    against: str
    by_seed: Mapping[int, float]
    interval: tuple[float, float]
    p: float
    claimed: bool

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return sum(self.by_seed.values()) / len(self.by_seed)


class Drift(NamedTuple):
    """How far the prior tasks moved since they were learned, in percent of their loss.

    Attributes:
        by_seed: seed -> mean over the prior tasks.
        interval: 95 % t-interval of the mean over seeds.
        tost: p that the mean lies outside the margin.
        worst_task, worst: the task with the largest mean over the seeds at which it is prior.
        is_small: both are within what the endpoint allows.
    """

    by_seed: Mapping[int, float]
    interval: tuple[float, float]
    tost: float
    worst_task: str
    worst: float
    is_small: bool


def read_endpoint(path: Path) -> Endpoint:
    """Read a TOML file. Raises ConfigError that names the first invalid key."""
    values = read_toml(path)
    if "digest" in values:
        message = "digest: it is computed from the file"
        raise ConfigError(message, field="digest", value=values["digest"], allowed="no such key")
    values["digest"] = file_digest(path)
    return checked("", values, Endpoint.model_validate, ConfigError)


def order_of(seed: int, orders: Orders) -> tuple[str, ...]:
    """The order of the tasks that a seed has."""
    return orders[seed % len(orders)]


def prior_loss(record: Record) -> float:
    """The sum over prior tasks, all but the last of the order, of their loss at the end."""
    return sum(record["loss"][-1][:-1])


def advantage(record: Record, base: Record) -> float:
    """d_s: how far the prior tasks' loss lies below that of another arm, in percent.

    Raises ConfigError if the two are not paired.
    """
    check_paired(record, base)
    return 100 * (1 - prior_loss(record) / prior_loss(base))


def advantages(arm: Mapping[int, Record], base: Mapping[int, Record]) -> dict[int, float]:
    """Seed -> d_s, for the seeds at which both arms were run. Raises as `advantage`."""
    shared = [seed for seed in arm if seed in base]
    return {seed: advantage(arm[seed], base[seed]) for seed in shared}


def by_seed(records: Sequence[Record], arm: str) -> dict[int, Record]:
    """The records of an arm, by seed. Raises ConfigError if a seed has two."""
    found: dict[int, Record] = {}
    for record in records:
        if record["arm"] != arm:
            continue
        seed = record["seed"]
        if seed in found:
            message = f"the experiment has two runs of {arm} with the seed {seed}"
            raise ConfigError(message, field="seed", value=seed, allowed="one run a seed")
        found[seed] = record
    return found


def missing(endpoint: Endpoint, records: Sequence[Record]) -> list[str]:
    """The runs that the endpoint still needs, as "arm seed"; nobody looks before it has all."""
    wanted = [(arm, seed) for arm in (endpoint.arm, *endpoint.against) for seed in endpoint.seeds]
    made = {(record["arm"], record["seed"]) for record in records}
    return [f"{arm} {seed}" for arm, seed in wanted if (arm, seed) not in made]


def verdict(endpoint: Endpoint, records: Sequence[Record]) -> list[Comparison]:
    """The comparisons of an endpoint, in its order.

    Args:
        endpoint: the endpoint.
        records: of one experiment; those of other arms and seeds are left out.

    Raises:
        ConfigError: a run is missing, a record was made under another endpoint, split or order, or
            two runs are not paired.
    """
    absent = missing(endpoint, records)
    if absent:
        message = f"{len(absent)} runs of the endpoint {endpoint.name} are missing"
        raise ConfigError(message, field="runs", value=absent[0], allowed="all of its runs")
    counted = [record for record in records if record["seed"] in endpoint.seeds]
    arm = by_seed(counted, endpoint.arm)
    _check(endpoint, arm)
    found: list[Comparison] = []
    may_claim = True
    for name in endpoint.against:
        base = by_seed(counted, name)
        _check(endpoint, base)
        d = advantages(arm, base)
        values = list(d.values())
        p = t_test(values)
        may_claim = may_claim and p < endpoint.alpha and sum(values) > 0
        found.append(Comparison(name, d, t_interval(values), p, may_claim))
    return found


def drift_of(endpoint: Endpoint, records: Sequence[Record]) -> Drift:
    """The drift of the endpoint's arm. Call it after `verdict`, which checks the records."""
    arm = by_seed([each for each in records if each["seed"] in endpoint.seeds], endpoint.arm)
    means = {seed: record["mean_drift"] for seed, record in arm.items()}
    by_task: dict[str, list[float]] = {}
    for record in arm.values():
        for task, drift in zip(record["order"][:-1], record["drift"][:-1], strict=True):
            by_task.setdefault(task, []).append(drift)
    mean_of = {task: sum(values) / len(values) for task, values in by_task.items()}
    worst_task = max(mean_of, key=mean_of.__getitem__)
    p = tost(list(means.values()), margin=endpoint.drift_margin)
    is_small = p < endpoint.alpha and mean_of[worst_task] <= endpoint.worst_drift
    interval = t_interval(list(means.values()))
    return Drift(means, interval, p, worst_task, mean_of[worst_task], is_small)


def _check(endpoint: Endpoint, records: Mapping[int, Record]) -> None:
    """Raise ConfigError if a record was made under another endpoint, split or order."""
    for seed, record in records.items():
        wanted = {
            "endpoint": endpoint.digest,
            "measure": endpoint.measure,
            "order": list(order_of(seed, endpoint.orders)),
        }
        found = {
            "endpoint": record.get("endpoint"),
            "measure": record["config"]["measure"],
            "order": record["order"],
        }
        for field, allowed in wanted.items():
            if found[field] != allowed:
                message = (
                    f"the record of {record['arm']}, seed {seed}, is not one of the endpoint "
                    f"{endpoint.name}"
                )
                raise ConfigError(message, field=field, value=found[field], allowed=allowed)


def endpoint_table(endpoint: Endpoint, records: Sequence[Record]) -> str:
    """The verdict and the drift, as Markdown; while runs are missing, only their number.

    Raises as `verdict`.
    """
    absent = missing(endpoint, records)
    if absent:
        return f"Endpoint {endpoint.name}: {len(absent)} runs are missing, first {absent[0]}."
    lines = [
        "| against | seeds | d, % [95 %] | smallest found, % | p | claimed |",
        "|---|---|---|---|---|---|",
    ]
    for each in verdict(endpoint, records):
        low, high = each.interval
        found = detectable_mean(list(each.by_seed.values()))
        lines.append(
            f"| {each.against} | {len(each.by_seed)} | {each.mean:+.2f} [{low:+.2f}, {high:+.2f}] "
            f"| {found:.2f} | {each.p:.2g} | {'yes' if each.claimed else 'no'} |"
        )
    drift = drift_of(endpoint, records)
    low, high = drift.interval
    mean = sum(drift.by_seed.values()) / len(drift.by_seed)
    lines += [
        "",
        f"Drift of prior tasks: {mean:+.2f} % [{low:+.2f}, {high:+.2f}], TOST ±"
        f"{endpoint.drift_margin:g} % p = {drift.tost:.2g}; worst task {drift.worst_task} "
        f"{drift.worst:+.2f} %. {'Within' if drift.is_small else 'Not within'} the margins.",
    ]
    return "\n".join(lines)
