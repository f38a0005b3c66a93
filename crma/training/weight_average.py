"""The moving average of weights while they train."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class WeightAverage:
    """The exponential moving average of parameters, over the steps taken so far.

    After n steps, the weights after step i count as decay^(n - i), and these counts are divided by
    their sum. So the start of training, which was no step, does not count, however few steps there
    were (the bias correction of Adam, Kingma & Ba 2015, section 3).

    Args:
        parameters: they are not changed until `apply`. The average of one that does not train is
            that parameter, bit for bit.
        decay: at least 0 and below 1.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.num_steps = 0

    @torch.no_grad()
    def update(self) -> None:
        """Count the weights after one more step."""
        self.num_steps += 1
        newest = (1 - self.decay) / (1 - self.decay**self.num_steps)
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter, newest)

    @torch.no_grad()
    def apply(self) -> None:
        """Set the parameters to their averages."""
        for average, parameter in zip(self.average, self.parameters, strict=True):
            parameter.copy_(average)

    @torch.no_grad()
    def adopt(self, averages: Iterable[Tensor], num_steps: int) -> None:
        """Take averages that were followed elsewhere, over so many steps."""
        self.num_steps = num_steps
        for average, other in zip(self.average, averages, strict=True):
            average.copy_(other)
