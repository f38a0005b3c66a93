"""Off against off, 200 times: how often /ablation finds a difference where there is none. Real model, sampled answers.

Each run asks 30 of the public questions, drawn anew, twice under the same adapters at temperature 0.7 with other seeds.
McNemar's exact p is discrete, so its share below 5 % lies under 5 %; the bootstrap's interval is printed beside it.
"""

import random

import pytest
from scipy import stats
from test_shipped import QUESTIONS, server

pytestmark = pytest.mark.e2e

RUNS, ITEMS = 200, 30


async def test_a_null_comparison_is_significant_no_more_often_than_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    rng, found = random.Random(0), []
    async with server(max_ablation_inflight=16) as client:
        for seed in range(RUNS):
            asked = [question.model_dump(exclude_defaults=True) for question in rng.sample(QUESTIONS, ITEMS)]
            body = {"questions": asked, "variants": ["task", "task"], "repeat": True, "seed": seed}
            answer = await client.post("/ablation", json=body | {"temperature": 0.7, "max_tokens": 8})
            found.append(answer.json()["comparisons"][0])
    assert all(each["n"] == ITEMS for each in found)
    flips = sum(each["mcnemar"]["gained"] + each["mcnemar"]["lost"] for each in found) / RUNS
    below = sum(each["mcnemar"]["p"] < 0.05 for each in found)
    apart = sum(not each["bootstrap"][0] <= 0 <= each["bootstrap"][1] for each in found)
    with capsys.disabled():
        print(f"\n{RUNS} null runs of {ITEMS} items, {flips:.1f} flips each: p < .05 in {below / RUNS:.3f},", end=" ")  # noqa: T201
        print(f"bootstrap apart from 0 in {apart / RUNS:.3f}")  # noqa: T201
    assert flips > 2, "too few flips for any p below 5 %"
    assert below <= stats.binom.ppf(0.999, RUNS, 0.05)
