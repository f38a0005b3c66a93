"""crma.training.weight_average: the average of the weights of the steps taken so far."""

import pytest
import torch
from torch import nn

from crma.training.weight_average import WeightAverage


def test_the_start_does_not_count_and_newer_weights_count_more() -> None:
    parameter = nn.Parameter(torch.tensor([100.0]))
    average = WeightAverage([parameter], 0.5)
    for value in (1.0, 2.0, 4.0):
        parameter.data.fill_(value)
        average.update()
    average.apply()
    assert parameter.item() == pytest.approx((0.25 * 1 + 0.5 * 2 + 1 * 4) / 1.75)


def test_the_average_of_one_step_is_that_step() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    average = WeightAverage([parameter], 0.9)
    parameter.data.copy_(torch.tensor([1.0, -2.0, 3.0]))
    average.update()
    average.apply()
    torch.testing.assert_close(parameter.data, torch.tensor([1.0, -2.0, 3.0]))


def test_what_does_not_train_keeps_every_bit() -> None:
    parameter = nn.Parameter(torch.randn(1000), requires_grad=False)
    before = parameter.clone()
    average = WeightAverage([parameter], 0.9)
    for _ in range(7):
        average.update()
    average.apply()
    assert parameter.equal(before)
