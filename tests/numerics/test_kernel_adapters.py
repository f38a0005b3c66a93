"""The native kernel's adapters against float64, in all variants that this processor has."""

import pytest
import torch
from kernel_variants import draw, relative_tolerance, turns_meanwhile
from torch import Tensor

from crma.method.lora import LoraPair
from server.engine.native.kernel import Kernel
from server.engine.native.lora_table import table_of

# Inputs and outputs of a site, and rank, first output column and width of its pairs.
SITES = [
    (1, 1, [(1, 0, 1)]),
    (50, 70, [(3, 0, 20), (9, 20, 50)]),
    (128, 96, [(8, 0, 96)]),
    (33, 40, [(2, 8, 5), (0, 0, 0)]),
]
Site = tuple[int, int, list[tuple[int, int, int]]]


def adapter(kernel: Kernel, site: Site, seed: int) -> list[tuple[int, LoraPair]]:
    generator = torch.Generator().manual_seed(seed)
    width, _, pairs = site
    drawn = []
    for rank, start, columns in pairs:
        A = torch.randn((rank, width), generator=generator).to(kernel.dtype)
        B = torch.randn((rank, columns), generator=generator).to(kernel.dtype)
        drawn.append((start, LoraPair(A, B.mT, 1.0)))
    return drawn


def delta(x: Tensor, pairs: list[tuple[int, LoraPair]], out: int) -> Tensor:
    """What an adapter adds for x [in], in float64."""
    y = torch.zeros(out, dtype=torch.float64)
    for start, pair in pairs:
        y[start : start + len(pair.B)] += pair.B.double() @ (pair.A.double() @ x.double())
    return y


@pytest.mark.parametrize("site", SITES, ids=str)
def test_each_row_gets_its_own_adapters_delta_with_the_same_bits_as_alone(
    kernel: Kernel, site: Site
) -> None:
    """Rows without an adapter stay as they are; neighbours with the same one share its reading."""
    adapters = [adapter(kernel, site, seed) for seed in range(3)]
    tables = [table_of([pairs], len(site[2])) for pairs in adapters]
    choice = [None, 0, 0, 1, *[2] * 19, None, 1, 0, *[1] * 3, 2]
    addresses = [0 if i is None else tables[i].data_ptr() for i in choice]
    loras = torch.tensor(addresses)
    x, y = draw(kernel, len(choice), site[0]), draw(kernel, len(choice), site[1])

    def add(rows: Tensor) -> Tensor:
        result = y[rows].clone()
        kernel.add_lora(result, x[rows].contiguous(), loras[rows].contiguous(), 0, len(site[2]))
        return result

    together = add(torch.arange(len(choice)))
    for row, index in enumerate(choice):
        added = 0 if index is None else delta(x[row], adapters[index], site[1])
        rtol = relative_tolerance(kernel, 1e-5)
        expected = y[row].double() + added
        torch.testing.assert_close(together[row].double(), expected, rtol=rtol, atol=1e-4)
        assert torch.equal(add(torch.tensor([row]))[0], together[row])
    shuffled = torch.randperm(len(choice), generator=torch.Generator().manual_seed(1))
    for size in (2, 5, 8, 28):
        for rows in shuffled.split(size):
            assert torch.equal(add(rows), together[rows])


def test_an_adapter_adds_to_what_it_reads(kernel: Kernel) -> None:
    """As a backbone does to the residual stream."""
    site = (64, 64, [(5, 0, 64)])
    pairs = adapter(kernel, site, 0)
    table = table_of([pairs], 1)
    x = draw(kernel, 100, 64)
    loras = torch.full((100,), table.data_ptr())
    expected = x.clone()
    kernel.add_lora(expected, x, loras, 0, 1)
    kernel.add_lora(x, x, loras, 0, 1)
    assert torch.equal(x, expected)


def test_other_threads_of_the_interpreter_run_while_adapters_of_a_prompt_are_added(
    kernel: Kernel,
) -> None:
    site = (1024, 1024, [(64, 0, 1024)])
    pairs = adapter(kernel, site, 0)
    table = table_of([pairs], 1)
    x, y = draw(kernel, 1500, 1024), draw(kernel, 1500, 1024)
    loras = torch.full((1500,), table.data_ptr())
    assert turns_meanwhile(lambda: kernel.add_lora(y, x, loras, 0, 1)) > 0
