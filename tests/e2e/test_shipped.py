"""The shipped adapters on the real base model, through the real server.

Needs `crma pull` and `crma data` first.
"""

import pytest
from paths import STORE
from shipped import server

from crma.data.splits import load_split
from crma.evaluation.offline import Served
from crma.evaluation.scorers import exact
from crma.models.base_model import find_base
from crma.models.model_shape import read_shape
from crma.store.adapter_store import AdapterStore

pytestmark = pytest.mark.e2e

TASKS = AdapterStore(STORE).task_names()


def test_the_shipped_store_has_no_problem() -> None:
    base = find_base()
    assert AdapterStore(STORE).verify(base=base, shape=read_shape(base)) == []


async def test_every_task_beats_the_base_model_on_its_public_questions() -> None:
    body = {"question_set": "public", "variants": ["task+crma", "base"], "seed": 7}
    async with server() as client:
        response = await client.post("/ablation", json=body)
    variants = response.json()["variants"]
    adapted = variants["task+crma"]["by_task"]
    base = variants["base"]["by_task"]
    assert set(base) == set(TASKS)
    for task in TASKS:
        assert adapted[task]["correct"] > base[task]["correct"]
    for variant in variants.values():
        assert variant["failed"] == 0
        assert variant["timed_out"] == 0


@pytest.mark.parametrize("task", TASKS)
def test_the_adapter_scores_the_accuracy_in_its_manifest(task: str) -> None:
    """Within 0.03: in bf16, batches of other sizes round differently and break ties differently."""
    served = Served(find_base(), AdapterStore(STORE))
    recorded = served.store.task(task).manifest.measured["holdout"]
    examples = load_split(task, "holdout")
    prompts = [example.prompt for example in examples]
    answers = served.answers(task, served.plan("task+crma", task), prompts, max_tokens=16)
    num_correct = 0
    for answer, example in zip(answers, examples, strict=True):
        if exact(answer, [example.completion]):
            num_correct += 1
    assert num_correct / len(examples) == pytest.approx(recorded["accuracy"], abs=0.03)
