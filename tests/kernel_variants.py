"""The native kernel as this processor can run it: each class, with each type."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.engine.native.cpu_class import own_classes
from server.engine.native.kernel import Kernel

VARIANTS = [
    pytest.param((dtype, each.name), id=f"{dtype}-{each.name}")
    for dtype in (torch.float32, torch.bfloat16)
    for each in own_classes()
]


def draw(kernel: Kernel, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(kernel.dtype)


def relative_tolerance(kernel: Kernel, fp32: float) -> float:
    return fp32 if kernel.dtype == torch.float32 else 2**-7


def turns_meanwhile(call: Callable[[], object]) -> int:
    """How many turns of a loop this thread makes while another one is in a call."""
    turns = 0
    seen = []

    def work() -> None:
        seen.append(turns)
        call()
        seen.append(turns)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        turns += 1
    return seen[1] - seen[0]
