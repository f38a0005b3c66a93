"""server.engine.native.joined_linear: what an adapter needs of a linear whose weight is packed."""

from unittest.mock import patch

import pytest
import tiny
import torch
from torch import nn

from crma.method.frozen_linear import squared_norms
from server.engine.native import joined_linear
from server.engine.native.joined_linear import join
from server.engine.native.kernel import Kernel


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_have_the_bits_of_those_of_the_weights_before_they_were_packed(
    dtype: torch.dtype, int8: bool
) -> None:
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    linears = [nn.Linear(96, out, bias=False).bfloat16().to(dtype) for out in (64, 24)]
    expected = [squared_norms(one.weight.detach().clone()) for one in linears]
    with torch.no_grad(), patch.object(joined_linear, "squared_norms") as computed:
        computed.side_effect = squared_norms
        joined = join(linears, Kernel(torch.float32, library.parent), int8=int8)
        assert computed.called == int8  # at once only where rounding changes the weights
        del linears
        for part, norms in zip(joined.parts, expected, strict=True):
            assert torch.equal(part.squared_norms, norms)
