"""crma.training.regime: which batch size, learning rate and averaging all arms then share."""

from typing import Any

import pytest

from crma.core.errors import ConfigError
from crma.training.regime import Cell, Setting, choose, grid, regime_table, take

NOISE = (0.99, 1.0, 1.01)  # a standard deviation of 1 %


def records(losses: dict[tuple[int, float], float], rank: int = 8) -> list[dict[str, Any]]:
    """Three seeds of each (batch size, learning rate); the last weights are 10 % worse."""
    made = []
    for (batch_size, lr), loss in losses.items():
        for factor in NOISE:
            record = {
                "config": {"batch_size": batch_size, "ema": 0.9, "lora": {"rank": rank, "lr": lr}},
                "mean_loss": loss * factor,
                "loss_unaveraged": [loss * factor, 1.2 * loss * factor],
            }
            made.append(record)
    return made


# Half of 16 gains 20 % at its best rate, half of 8 only 2.5 %.
LOSSES = {(16, 1e-3): 0.50, (16, 2e-3): 0.48, (8, 1e-3): 0.40, (8, 2e-3): 0.43, (4, 1e-3): 0.39}


def test_the_gain_of_half_the_batch_is_counted_at_its_best_rate() -> None:
    cells = grid(records(LOSSES))
    cell = cells[Setting(16, 1e-3, True)][8]
    assert cell.loss == pytest.approx(0.50)
    assert cell.gain == pytest.approx(20)
    assert cell.spread == pytest.approx(1)
    assert cells[Setting(8, 1e-3, True)][8].gain == pytest.approx(2.5)
    assert cells[Setting(4, 1e-3, True)][8].gain is None
    assert cells[Setting(8, 1e-3, False)][8].loss == pytest.approx(0.44)


def test_the_cheapest_setting_that_passes_at_every_rank_is_taken() -> None:
    assert choose(grid(records(LOSSES))) == Setting(8, 1e-3, True)
    assert choose(grid([*records(LOSSES), *records(LOSSES, 20)])) == Setting(8, 1e-3, True)
    steep = LOSSES | {(4, 1e-3): 0.2}
    assert choose(grid([*records(LOSSES), *records(steep, 20)])) is None
    assert "Taken: batch 8, lr 0.001, averaged weights." in regime_table(records(LOSSES))
    assert regime_table(records(steep)).endswith("try smaller batches or more steps.")


def test_seeds_that_differ_too_much_do_not_pass() -> None:
    made = records(LOSSES)
    for i, each in enumerate(made):
        factor = (0.9, 1.0, 1.1)[i % 3]
        each["mean_loss"] *= factor
        each["loss_unaveraged"] = [factor * value for value in each["loss_unaveraged"]]
    assert choose(grid(made)) is None


def test_where_no_setting_passes_the_lowest_loss_over_all_ranks_is_taken() -> None:
    steep = LOSSES | {(4, 1e-3): 0.2}
    cells = grid([*records(LOSSES), *records(steep, 20)])
    assert take(cells) == (Setting(4, 1e-3, True), False)
    assert take(grid(records(LOSSES))) == (Setting(8, 1e-3, True), True)
    # A setting that was not tried at every rank cannot be taken, however low its loss.
    odd = grid([*records(steep), *records({(8, 1e-3): 0.5, (4, 2e-3): 0.1}, 20)])
    assert take(odd) == (Setting(8, 1e-3, True), False)
    with pytest.raises(ConfigError, match="tried at every rank"):
        take(grid([*records({(8, 1e-3): 0.5}), *records({(4, 1e-3): 0.5}, 20)]))
    assert "Taken because it has the lowest loss" in str(take(cells))


def test_at_three_percent_a_gain_is_too_large_and_a_spread_is_not() -> None:
    assert not Cell((0.5, 0.5), gain=3.0).passes
    assert Cell((0.5, 0.5), gain=2.999).passes
    assert Cell((0.5, 0.5), gain=-1.0).passes  # half the batch is worse
    spread = Cell((0.97, 1.0, 1.03), gain=0.0)
    assert spread.spread == pytest.approx(3.0)
    assert not Cell((0.96, 1.0, 1.04), gain=0.0).passes
    assert not Cell((0.5,), gain=0.0).passes  # one seed has no spread


def test_smaller_batches_say_what_halving_the_smallest_batch_gains() -> None:
    first = {(8, 1e-3): 0.50, (4, 1e-3): 0.40}
    assert choose(grid(records(first))) is None
    both = [*records(first), *records({(2, 1e-3): 0.395})]
    assert choose(grid(both)) == Setting(4, 1e-3, True)
