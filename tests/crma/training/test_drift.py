"""crma.training.drift: the measures of forgetting, on a matrix small enough to check by hand."""

import pytest

from crma.training.drift import measures

LOSS = [[4.0, 8.0, 5.0], [1.0, 7.0, 5.0], [1.5, 2.0, 4.0], [2.0, 1.0, 3.0]]
ACCURACY = [[0.0, 0.1, 0.2], [0.8, 0.2, 0.2], [0.9, 0.6, 0.4], [0.5, 0.7, 0.9]]


def test_the_measures_follow_their_definitions() -> None:
    found = measures(LOSS, ACCURACY, [1, 2, 3])
    assert found["drift"] == pytest.approx([100, -50, 0])
    assert found["drift_nats"] == pytest.approx([1, -1, 0])
    assert found["retained_gain"] == pytest.approx([2 / 3, 7 / 6, 1])
    assert found["mean_drift"] == pytest.approx(25)
    assert found["mean_loss"] == pytest.approx(2)
    assert found["ACC"] == pytest.approx(0.7)
    assert found["BWT"] == pytest.approx((-0.3 + 0.1) / 2)
    assert found["FWT"] == pytest.approx((0.1 + 0.2) / 2)
    assert found["forgetting"] == pytest.approx((0.9 - 0.5) / 2)


def test_joint_training_has_no_measure_of_a_sequence() -> None:
    found = measures([LOSS[0], LOSS[3]], [ACCURACY[0], ACCURACY[3]], [1, 1, 1])
    assert found["drift"] == [0, 0, 0]
    assert [found[name] for name in ("mean_drift", "BWT", "FWT", "forgetting")] == [None] * 4


def test_what_needs_a_cell_that_was_not_measured_is_unknown() -> None:
    """A screening run measures L_{t,t} and L_{T,t} only."""
    loss = [[None] * 3, [1.0, None, None], [None, 2.0, None], LOSS[3]]
    accuracy = [[None] * 3, [0.8, None, None], [None, 0.6, None], ACCURACY[3]]
    whole = measures(LOSS, ACCURACY, [1, 2, 3])
    found = measures(loss, accuracy, [1, 2, 3])
    for name in ("drift", "drift_nats", "mean_drift", "mean_loss", "ACC", "BWT"):
        assert found[name] == whole[name]
    assert found["retained_gain"] == [None] * 3
    assert (found["FWT"], found["forgetting"]) == (None, None)
