"""How far bf16 is from exact: our error beside that of transformers' own modules.

A bound on the difference of the two has to allow for both errors, and lets real mistakes pass. Both
are compared with fp32 instead, on the same tokens, and the ratio of the two is bounded.
"""

import math
from dataclasses import dataclass

import torch
from schedules import Answer, Call, World
from torch import Tensor

MAX_RATIO = 1.25  # of all tokens together
MAX_RATIO_OF_ONE = 2.0  # of the tokens of one request, which are few


def logprobs(answer: Answer) -> Tensor:
    """The log-probabilities of the tokens of prompt and answer that the engine gave."""
    return torch.tensor([one.logprob for one in (*answer.prompt_logprobs, *answer.logprobs)])


def of_tokens(world: World, call: Call, answer: Answer) -> Tensor:
    """The oracle's log-probability of every token of prompt and answer, from one pass."""
    tokens = torch.tensor([*call.prompt, *answer.tokens])[1:, None]
    return world.distribution(call, answer.tokens).gather(-1, tokens)[:, 0]


@dataclass
class Rounding:
    """Errors of log-probabilities in bf16, against fp32.

    Attributes:
        ours: the sum of our squared errors.
        theirs: that of transformers' modules in bf16.
        num: how many log-probabilities were compared.
        largest: the largest error of transformers' modules.
    """

    ours: float = 0.0
    theirs: float = 0.0
    num: int = 0
    largest: float = 0.0

    def add(self, ours: Tensor, theirs: Tensor, exact: Tensor) -> "Rounding":
        """Add the log-probabilities [n] of some tokens; returns these alone."""
        found = Rounding(
            ours=(ours - exact).square().sum().item(),
            theirs=(theirs - exact).square().sum().item(),
            num=len(exact),
            largest=(theirs - exact).abs().max().item(),
        )
        self.ours += found.ours
        self.theirs += found.theirs
        self.num += found.num
        self.largest = max(self.largest, found.largest)
        return found

    @property
    def ratio(self) -> float:
        """Our root mean square error over theirs."""
        return math.sqrt(self.ours / self.theirs)

    def __str__(self) -> str:
        if not self.num:
            return "nothing rounded"
        ours, theirs = (math.sqrt(total / self.num) for total in (self.ours, self.theirs))
        return f"{self.num} tokens: ours {ours:.4f}, theirs {theirs:.4f}, ratio {self.ratio:.3f}"
