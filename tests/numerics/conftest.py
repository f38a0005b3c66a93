"""The kernel's variants, for the tests that run in each."""

import pytest
import tiny
from kernel_variants import VARIANTS

from server.engine.native.kernel import Kernel


@pytest.fixture(params=VARIANTS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    library = tiny.library()
    if library is None:
        pytest.skip("no C++ compiler")
    dtype, name = request.param
    return Kernel(dtype, library.parent, name)
