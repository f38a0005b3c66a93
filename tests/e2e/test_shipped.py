"""The shipped adapters on the real base model, through the real server. Needs `crma pull` and `crma data` before."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from crma.data import load_split
from crma.pull import find_base
from crma.question_set import read_question_set
from crma.served import Served
from crma.store import AdapterStore
from server.__main__ import build
from server.settings import Settings

pytestmark = pytest.mark.e2e

STORE = Path(__file__).parents[2] / "adapters_store"
TASKS = AdapterStore(STORE).task_names()
QUESTIONS = read_question_set(STORE / "question_sets" / "public.jsonl").questions


@asynccontextmanager
async def server(**settings: object) -> AsyncIterator[httpx.AsyncClient]:
    """The app as `python -m server` builds it, ready."""
    app = build(Settings(store=STORE, **settings))
    async with app.router.lifespan_context(app):
        await app.state.starting
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=300) as client:
            yield client


def test_the_shipped_store_has_no_problem() -> None:
    from crma.injection import shapes_of_folder

    base = find_base()
    assert AdapterStore(STORE).verify(base=base, shapes=shapes_of_folder(base.path)) == []


async def test_every_task_answers_its_public_questions_better_with_crma_than_the_base_model() -> None:
    async with server() as client:
        body = {"question_set": "public", "variants": ["task+crma", "task", "base"], "seed": 7}
        answer = (await client.post("/ablation", json=body)).json()
    by_task = {variant: row["by_task"] for variant, row in answer["variants"].items()}
    assert set(by_task["base"]) == set(TASKS)
    for task in TASKS:
        assert by_task["task+crma"][task]["correct"] > by_task["base"][task]["correct"]
    assert all(row["failed"] == row["timed_out"] == 0 for row in answer["variants"].values())


async def test_a_null_run_has_no_flips_even_when_each_side_runs_apart() -> None:
    async with server(dtype="float32") as client:
        body = {"question_set": "public", "tasks": ["legal"], "variants": ["task", "task"], "repeat": True}
        comparison = (await client.post("/ablation", json=body)).json()["comparisons"][0]
    assert comparison["mcnemar"] == {"gained": 0, "lost": 0, "p": 1.0}


async def test_crma_off_is_a_server_that_never_loaded_crma_token_for_token() -> None:
    """fp32; the questions share batches with rows that have CRMA on."""
    requests = [{"prompt": q.question, "task": q.task, "crma": False, "logprobs": True} for q in QUESTIONS[::5]]
    answers = []
    for load_backbone in (True, False):
        async with server(dtype="float32", load_backbone=load_backbone) as client:
            answers.append([(await client.post("/generate", json=request)).json() for request in requests])
    for on, off in zip(*answers, strict=True):
        assert on["text"] == off["text"]
        assert on["usage"] == off["usage"]
        assert on["logprobs"] == pytest.approx(off["logprobs"], abs=1e-4)
        assert on["provenance"]["crma"] is None


@pytest.mark.parametrize("task", TASKS)
def test_the_measures_in_a_manifest_are_what_the_adapter_scores(task: str) -> None:
    served = Served(find_base(), AdapterStore(STORE))
    recorded = served.store.task(task).manifest.measured["holdout"]
    examples = load_split(task, "holdout")
    answers = served.answers(task, served.plan("task+crma", task), [e.prompt for e in examples], max_tokens=16)
    from crma.scorers import exact

    correct = sum(exact(answer, [e.completion]) for answer, e in zip(answers, examples, strict=True))
    assert correct / len(examples) == pytest.approx(recorded["accuracy"], abs=0.03)  # bf16: other batches, other ties
