"""The device of these tests: a GPU, or the CPU with `--device cpu`.

On a CPU they run the same code but for streams, tiles and what is compiled: it shows that the tests
themselves are right.
"""

import pytest
import torch


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    name = request.config.getoption("--device") or "cuda"
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(name)
