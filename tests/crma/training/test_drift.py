"""crma.training.drift: the figures of continual learning, on a matrix small enough to reckon by hand."""

import pytest

from crma.training.drift import measures

LOSS = [[4.0, 8.0, 5.0], [1.0, 7.0, 5.0], [1.5, 2.0, 4.0], [2.0, 1.0, 3.0]]
ACCURACY = [[0.0, 0.1, 0.2], [0.8, 0.2, 0.2], [0.9, 0.6, 0.4], [0.5, 0.7, 0.9]]


def test_the_figures_are_those_of_their_definitions() -> None:
    found = measures(LOSS, ACCURACY, [1, 2, 3])
    assert found["drift"] == pytest.approx([100, -50, 0])
    assert found["drift_nats"] == pytest.approx([1, -1, 0])
    assert found["retained_gain"] == pytest.approx([2 / 3, 7 / 6, 1])
    expected = {
        "mean_drift": 25,
        "mean_loss": 2,
        "ACC": 0.7,
        "BWT": (-0.3 + 0.1) / 2,
        "FWT": (0.1 + 0.2) / 2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["forgetting"] == pytest.approx((0.9 - 0.5) / 2)


def test_what_is_not_sequential_has_no_figure_of_a_sequence() -> None:
    found = measures([LOSS[0], LOSS[3]], [ACCURACY[0], ACCURACY[3]], [1, 1, 1])
    assert found["drift"] == [0, 0, 0]
    assert [found[name] for name in ("mean_drift", "BWT", "FWT", "forgetting")] == [None] * 4
