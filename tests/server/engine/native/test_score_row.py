"""server.engine.native.score_row and score_rows: both choose as the masses of all tokens say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.native import sampler, score_rows
from server.engine.native.score_row import ScoreRow
from server.engine.request import SamplingParams

VOCAB = 5000
SHAPES = ("plain", "ties", "level", "few", "huge", "tiny")
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-40, 0.01, 0.6, 1.0, 2.0, 1e30, 1e38]),
    top_p=st.sampled_from([1.0, 1.0, 0.3, 0.9, 0.9999, 1e-30]),
    top_k=st.sampled_from([0, 0, 1, 50, 3000]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
)
POINTS = st.floats(0, 1, exclude_min=True)


def scores_of(shape: str, seed: int) -> torch.Tensor:
    """[VOCAB] fp32."""
    noise = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))
    shaped = {
        "plain": 3 * noise,
        "ties": (2 * noise).round(),
        "level": 0 * noise,
        "few": noise.masked_fill(noise < 1, -torch.inf),
        "huge": 1e38 * noise.clamp(-3, 3),
        "tiny": 1e-40 * noise,
    }
    return shaped[shape]


@settings(derandomize=True, max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(PARAMS, POINTS, st.sampled_from([*SHAPES])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 9),
)
def test_a_processor_and_a_device_choose_the_same(
    wanted: list[tuple[SamplingParams, float, str]], seed: int
) -> None:
    scores = torch.stack([scores_of(shape, seed) for *_, shape in wanted])
    params = [each for each, *_ in wanted]
    points = [point for _, point, _ in wanted]
    expected = score_rows.choose(scores, params, points)
    rows = zip(map(ScoreRow, scores.numpy()), params, points, strict=True)
    assert [row.choose(of_row, point) for row, of_row, point in rows] == expected
    assert sampler._choose_on_cpu(scores, params, points) == expected


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_point_at_the_end_of_a_share_draws_the_token_that_has_the_share(top_p: float) -> None:
    """All tokens are alike, and each point is the very end of a token's share."""
    scores = np.zeros(20_000, np.float32)
    num_kept = int(top_p * len(scores))
    params = SamplingParams(temperature=0.7, top_p=top_p)
    points = [end / num_kept for end in range(1, num_kept, 997)]
    found = [ScoreRow(scores).choose(params, point) for point in points]
    together = torch.from_numpy(scores).expand(len(points), -1)
    assert found == score_rows.choose(together, [params] * len(points), points)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.sampled_from(["plain", "ties", "level", "few"]),
    st.sampled_from([1, 5, 39, 40, 64, 200, 4999, 5000, 6000]),
)
def test_the_largest_scores_are_ranked_and_of_ties_the_lowest_ids_come_first(
    shape: str, width: int
) -> None:
    """40 is the number of blocks."""
    scores = scores_of(shape, 0)
    expected = scores.sort(descending=True, stable=True).indices[:width]
    assert ScoreRow(scores.numpy()).ranked(width).tolist() == expected.tolist()
