"""server.engine.native.score_row and score_rows: both choose as the masses of all tokens say."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.native import score_row, score_rows
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
    st.sampled_from([0, 8192]),
)
def test_a_processor_and_a_device_choose_the_same(
    wanted: list[tuple[SamplingParams, float, str]], seed: int, max_exact: int
) -> None:
    """Whether draws are estimated first or not."""
    scores = torch.stack([scores_of(shape, seed) for *_, shape in wanted])
    params = [each for each, *_ in wanted]
    points = [point for _, point, _ in wanted]
    with patch.object(score_row, "MAX_EXACT", max_exact):
        rows = zip(map(ScoreRow, scores.numpy()), params, points, strict=True)
        found = [row.choose(of_row, point) for row, of_row, point in rows]
    assert found == score_rows.choose(scores, params, points)


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_an_estimate_is_not_taken_where_its_error_could_change_the_draw(top_p: float) -> None:
    """All tokens are alike, and each point is the very end of a token's share."""
    scores = np.zeros(20_000, np.float32)
    num_kept = int(top_p * len(scores))
    params = SamplingParams(temperature=0.7, top_p=top_p)
    points = [end / num_kept for end in range(1, num_kept, 997)]
    found = [ScoreRow(scores).choose(params, point) for point in points]
    together = torch.from_numpy(scores).expand(len(points), -1)
    assert found == score_rows.choose(together, [params] * len(points), points)


def test_estimates_tell_most_draws() -> None:
    """Else a draw takes three times as long."""
    scores = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).numpy()
    params = SamplingParams(temperature=0.25)
    points = np.linspace(0.01, 0.99, 99).tolist()
    masses = score_row._Draw._masses
    with patch.object(score_row._Draw, "_masses", autospec=True, side_effect=masses) as exact:
        for point in points:
            ScoreRow(scores).choose(params, point)
    assert exact.call_count < len(points) / 2


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
