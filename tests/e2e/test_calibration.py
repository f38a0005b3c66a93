"""How often /ablation finds a difference where there is none, on the real model.

The server answers the 100 public questions 24 times with CRMA off at temperature 0.7, each time
with its own seeds. A null comparison takes two of these arms on 60 randomly drawn questions, so any
difference that it finds is a false positive. There are 200 of them.

Arms and questions are used more than once, so the comparisons are not independent: the binomial
bound is a requirement, not an exact test. McNemar's exact p-value is discrete, so fewer than 5 % of
them are expected below 0.05. The share of bootstrap intervals that exclude 0 is printed only.
"""

import random
import sys
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import httpx
import pytest
from paths import STORE
from scipy import stats
from shipped import server

from crma.evaluation.ablation import AblationSettings, ItemResult
from crma.evaluation.question_set import read_question_set
from crma.evaluation.report import report

pytestmark = pytest.mark.e2e

NUM_COMPARISONS = 200
NUM_ITEMS = 60
QUESTIONS = read_question_set(STORE / "question_sets" / "public.jsonl").questions

Arm = list[ItemResult]  # one answer to each question


async def sample_arms(client: httpx.AsyncClient) -> list[Arm]:
    """Let the server answer all questions, eight arms a request, with CRMA off."""
    arms: list[Arm] = []
    for seed in range(3):
        body = {
            "question_set": "public",
            "variants": ["task"] * 8,
            "repeat": True,
            "seed": seed,
            "max_tokens": 8,
            "temperature": 0.7,
        }
        response = await client.post("/ablation", json=body)
        items = response.json()["items"]
        outputs_by_item = [item["outputs"].values() for item in items]
        outputs_by_arm = zip(*outputs_by_item, strict=True)
        arms += [as_results(outputs) for outputs in outputs_by_arm]
    return arms


def as_results(outputs: Iterable[dict[str, Any]]) -> Arm:
    return [ItemResult("scored", output["text"]) for output in outputs]


def compare_arms(arms: list[Arm]) -> list[dict[str, Any]]:
    """Compare random pairs of arms, each on randomly drawn questions."""
    rng = random.Random(0)
    comparisons = []
    pairs = rng.sample(list(combinations(arms, 2)), NUM_COMPARISONS)
    for seed, (a, b) in enumerate(pairs):
        drawn = rng.sample(range(len(QUESTIONS)), NUM_ITEMS)
        questions = [QUESTIONS[i] for i in drawn]
        results = {"a": [a[i] for i in drawn], "b": [b[i] for i in drawn]}
        compared = report(questions, results, AblationSettings(seed=seed))
        comparisons.append(compared["comparisons"][0])
    return comparisons


async def test_null_comparisons_are_significant_no_more_often_than_their_level(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with server(max_ablation_inflight=16, num_threads=1) as client:
        arms = await sample_arms(client)
    num_flips = 0
    num_significant = 0
    num_excluding_zero = 0
    for comparison in compare_arms(arms):
        mcnemar = comparison["mcnemar"]
        num_flips += mcnemar["gained"] + mcnemar["lost"]
        if mcnemar["p"] < 0.05:
            num_significant += 1
        low, high = comparison["bootstrap"]
        if not low <= 0 <= high:
            num_excluding_zero += 1
    flips = num_flips / NUM_COMPARISONS
    with capsys.disabled():
        sys.stderr.write(
            f"\n{NUM_COMPARISONS} null comparisons of {NUM_ITEMS} items, {flips:.1f} flips each: "
            f"p < .05 in {num_significant / NUM_COMPARISONS:.3f}, "
            f"bootstrap excludes 0 in {num_excluding_zero / NUM_COMPARISONS:.3f}\n"
        )
    assert flips > 6, "too few flips for any p below 5 %"
    assert num_significant <= stats.binom.ppf(0.999, NUM_COMPARISONS, 0.05)
