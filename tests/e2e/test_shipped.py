"""The shipped adapters on the real base model, through the real server. Needs `crma pull` and `crma data` before."""

import pytest
from paths import STORE
from shipped import server

from crma.data.splits import load_split
from crma.evaluation.offline import Served
from crma.models.base_model import find_base
from crma.models.model_shape import read_shape
from crma.store.adapter_store import AdapterStore

pytestmark = pytest.mark.e2e

TASKS = AdapterStore(STORE).task_names()


def test_the_shipped_store_has_no_problem() -> None:
    base = find_base()
    assert AdapterStore(STORE).verify(base=base, shape=read_shape(base)) == []


async def test_every_task_answers_its_public_questions_better_with_crma_than_the_base_model() -> (
    None
):
    body = {"question_set": "public", "variants": ["task+crma", "base"], "seed": 7}
    async with server() as client:
        answer = (await client.post("/ablation", json=body)).json()
    by_task = {variant: row["by_task"] for variant, row in answer["variants"].items()}
    assert set(by_task["base"]) == set(TASKS)
    for task in TASKS:
        assert by_task["task+crma"][task]["correct"] > by_task["base"][task]["correct"]
    assert all(row["failed"] == row["timed_out"] == 0 for row in answer["variants"].values())


@pytest.mark.parametrize("task", TASKS)
def test_the_measures_in_a_manifest_are_what_the_adapter_scores(task: str) -> None:
    served = Served(find_base(), AdapterStore(STORE))
    recorded = served.store.task(task).manifest.measured["holdout"]
    examples = load_split(task, "holdout")
    answers = served.answers(
        task, served.plan("task+crma", task), [e.prompt for e in examples], max_tokens=16
    )
    from crma.evaluation.scorers import exact

    correct = sum(
        exact(answer, [e.completion]) for answer, e in zip(answers, examples, strict=True)
    )
    assert correct / len(examples) == pytest.approx(
        recorded["accuracy"], abs=0.03
    )  # bf16: other batches, other ties
