"""The regime: batch size, learning rate and averaging of weights that all arms then share.

The rule, stated before the runs: the cheapest setting at which halving the batch gains less than
MAX_GAIN and the seeds differ by at most MAX_SPREAD, at every rank that was tried. Larger batches
are cheaper. Of several settings with one batch size, the one with the lowest loss. Where no setting
passes, a study first tries smaller batches; if none passes then either, all arms share the setting
with the lowest loss, under which a plain LoRA is hardest to beat.
"""

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from crma.core.errors import ConfigError
from crma.training.pairing import Record

MAX_GAIN = 3.0  # percent of loss
MAX_SPREAD = 3.0  # percent of loss, one standard deviation


class Setting(NamedTuple):
    """What all arms share."""

    batch_size: int
    lr: float
    averaged: bool

    def __str__(self) -> str:
        """In words."""
        weights = "averaged" if self.averaged else "last"
        return f"batch {self.batch_size}, lr {self.lr:g}, {weights} weights"


class Taken(NamedTuple):
    """The setting that all arms share, and whether it passes the rule."""

    setting: Setting
    by_rule: bool

    def __str__(self) -> str:
        """In words."""
        if self.by_rule:
            return f"Taken: {self.setting}."
        return f"No setting passes. Taken because it has the lowest loss: {self.setting}."


class Cell(NamedTuple):
    """The runs of one setting at one rank.

    Attributes:
        losses: mean loss of the tasks, of each seed.
        gain: by how much half the batch lowers the mean loss at its best learning rate, in percent;
            None if no such batch was tried.
    """

    losses: tuple[float, ...]
    gain: float | None

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return mean(self.losses)

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds, in percent of the mean; None for one seed."""
        return 100 * stdev(self.losses) / self.loss if len(self.losses) > 1 else None

    @property
    def passes(self) -> bool:
        """Whether the rule allows it."""
        if self.gain is None or self.spread is None:
            return False
        return self.gain < MAX_GAIN and self.spread <= MAX_SPREAD


Grid = Mapping[Setting, Mapping[int, Cell]]  # setting -> rank -> cell


def grid(records: Sequence[Record]) -> Grid:
    """The cells of all records, which may be of several ranks.

    A run that averaged its weights counts twice: with them, and with the weights after its last
    steps, which it measured too.
    """
    losses: dict[Setting, dict[int, list[float]]] = {}
    for record in records:
        config = record["config"]
        rank, lr = config["lora"]["rank"], config["lora"]["lr"]
        measured = {bool(config["ema"]): record["mean_loss"]}
        if config["ema"]:
            measured[False] = mean(record["loss_unaveraged"])
        for averaged, loss in measured.items():
            setting = Setting(config["batch_size"], lr, averaged)
            losses.setdefault(setting, {}).setdefault(rank, []).append(loss)
    cells: dict[Setting, dict[int, Cell]] = {}
    for setting, by_rank in losses.items():
        cells[setting] = {
            rank: Cell(tuple(values), _gain(losses, setting, rank, mean(values)))
            for rank, values in by_rank.items()
        }
    return cells


def _gain(
    losses: Mapping[Setting, Mapping[int, Sequence[float]]],
    setting: Setting,
    rank: int,
    loss: float,
) -> float | None:
    """By how much half the batch lowers a loss at its best learning rate, in percent."""
    half = [
        mean(by_rank[rank])
        for other, by_rank in losses.items()
        if other.batch_size * 2 == setting.batch_size
        and other.averaged == setting.averaged
        and rank in by_rank
    ]
    return 100 * (1 - min(half) / loss) if half else None


def choose(cells: Grid) -> Setting | None:
    """The setting that the rule takes; None if it takes none."""
    passing = []
    for setting, total in _totals(cells).items():
        if all(cell.passes for cell in cells[setting].values()):
            passing.append((-setting.batch_size, total, setting))
    return min(passing)[-1] if passing else None


def take(cells: Grid) -> Taken:
    """The setting that the rule takes; if it takes none, the one with the lowest loss.

    Raises ConfigError if no setting was tried at every rank.
    """
    totals = _totals(cells)
    if not totals:
        message = "the regime needs a setting that was tried at every rank"
        raise ConfigError(message, field="runs", value=len(cells), allowed="at least one")
    passing = choose(cells)
    return Taken(passing or min(totals, key=totals.__getitem__), passing is not None)


def _totals(cells: Grid) -> dict[Setting, float]:
    """The loss of each setting that was tried at every rank, summed over ranks."""
    ranks = {rank for by_rank in cells.values() for rank in by_rank}
    totals = {}
    for setting, by_rank in cells.items():
        if set(by_rank) == ranks:
            totals[setting] = sum(cell.loss for cell in by_rank.values())
    return totals


def regime_table(records: Sequence[Record]) -> str:
    """The grid as Markdown, and the setting that the rule takes."""
    lines = [
        "| batch | lr | weights | rank | seeds | loss | seed sd, % | half the batch gains, % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    cells = grid(records)
    for setting in sorted(cells, reverse=True):
        for rank, cell in sorted(cells[setting].items()):
            weights = "averaged" if setting.averaged else "last"
            lines.append(
                f"| {setting.batch_size} | {setting.lr:g} | {weights} | {rank} "
                f"| {len(cell.losses)} | {cell.loss:.4f} | {_percent(cell.spread)} "
                f"| {_percent(cell.gain)} |"
            )
    chosen = choose(cells)
    if chosen is None:
        verdict = "No setting passes: try smaller batches or more steps."
    else:
        verdict = f"Taken: {chosen}."
    return "\n".join([*lines, "", verdict])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
