"""crma.generate: draws at the ends, and the end of an answer. For the rest it is the sampler's equal: test_sampler."""

from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import injection

from crma.generate import Generation, generate, next_token


@settings(derandomize=True, max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.floats(0.1, 5.0))
def test_the_first_and_the_last_number_draw_a_token_of_the_nucleus(seed: int, top_p: float, t: float) -> None:
    """Sums of floats in two orders differ; the draw must not fall behind the last token that is left, nor the first."""
    logits = 3 * torch.randn(5000, generator=torch.Generator().manual_seed(seed))
    probabilities = torch.softmax(logits.double() / t, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", Mock(side_effect=torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)))
        for token in (next_token(logits, t, 0, top_p, None) for _ in range(2)):
            assert probabilities[probabilities > probabilities[token]].sum() < top_p + 1e-6


def test_a_stop_token_ends_it_and_is_no_part_of_it() -> None:
    free = generate(injection(), [3, 4, 5], max_tokens=6)
    first = free.token_ids.index(free.token_ids[3])
    stopped = generate(injection(), [3, 4, 5], max_tokens=6, stop_ids=[free.token_ids[3]])
    assert stopped == Generation(free.token_ids[:first], free.logprobs[:first], "stop")
