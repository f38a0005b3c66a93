"""Off against off, 200 times: how often /ablation finds a difference where there is none. Real model, sampled answers.

The server answers the 100 public questions 24 times with CRMA off at temperature 0.7, each time with seeds of its
own. A null comparison is of two of these arms on 60 of the questions, drawn anew. Arms and questions are used more
than once, so the 200 are not independent: the bound, of a binomial, is one that they have to keep, and not an exact
test. McNemar's exact p is discrete, so its share below 5 % lies under 5 %; the bootstrap's interval is printed beside
it.
"""

import random
from itertools import combinations

import pytest
from paths import STORE
from scipy import stats
from shipped import server

from crma.evaluation.ablation import AblationSettings, ItemResult
from crma.evaluation.question_set import read_question_set
from crma.evaluation.report import report

pytestmark = pytest.mark.e2e

RUNS, ITEMS = 200, 60
QUESTIONS = read_question_set(STORE / "question_sets" / "public.jsonl").questions


async def test_a_null_comparison_is_significant_no_more_often_than_it_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arms: list[list[ItemResult]] = []
    async with server(max_ablation_inflight=16, num_threads=1) as client:
        for seed in range(3):
            body = {
                "question_set": "public",
                "variants": ["task"] * 8,
                "repeat": True,
                "seed": seed,
                "max_tokens": 8,
            }
            items = (await client.post("/ablation", json=body | {"temperature": 0.7})).json()[
                "items"
            ]
            outputs = [item["outputs"].values() for item in items]
            arms += [
                [ItemResult("scored", each["text"]) for each in arm]
                for arm in zip(*outputs, strict=True)
            ]
    rng, found = random.Random(0), []
    for seed, (a, b) in enumerate(rng.sample(list(combinations(arms, 2)), RUNS)):
        drawn = rng.sample(range(len(QUESTIONS)), ITEMS)
        rows = {"a": [a[i] for i in drawn], "b": [b[i] for i in drawn]}
        compared = report([QUESTIONS[i] for i in drawn], rows, AblationSettings(seed=seed))
        found.append(compared["comparisons"][0])
    flips = sum(each["mcnemar"]["gained"] + each["mcnemar"]["lost"] for each in found) / RUNS
    below = sum(each["mcnemar"]["p"] < 0.05 for each in found)
    apart = sum(not each["bootstrap"][0] <= 0 <= each["bootstrap"][1] for each in found)
    with capsys.disabled():
        print(
            f"\n{RUNS} null runs of {ITEMS} items, {flips:.1f} flips each: p < .05 in {below / RUNS:.3f},",
            end=" ",
        )  # noqa: T201
        print(f"bootstrap apart from 0 in {apart / RUNS:.3f}")  # noqa: T201
    assert flips > 6, "too few flips for any p below 5 %"
    assert below <= stats.binom.ppf(0.999, RUNS, 0.05)
