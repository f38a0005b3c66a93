"""POST /ablation: which generations run, what counts as an answer, and what it leaves to others."""

import asyncio
import json
from operator import itemgetter
from typing import Any

import pytest
import tiny
from api import BASE, Serve, Served

from server.engine.errors import EngineStopped, QueueFull
from server.engine.request import ConstraintKind, FinishReason, Request
from server.http.body import EXAMPLES


def question(i: int = 0, **change: Any) -> dict[str, Any]:
    item = {"id": f"q{i}", "task": "medical", "question": "Which?", "answers": ["one two"]}
    return item | change


async def ablate(served: Served, status: int = 200, **body: Any) -> dict[str, Any]:
    response = await served.client.post("/ablation", json=body)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


async def test_the_answer_has_the_documented_shape_and_names_what_answered(served: Served) -> None:
    served.engine.answer = lambda request: "one two" if request.selection.crma_digest else "no"
    body = await ablate(
        served, question_set="public", tasks=["medical"], variants=["task+crma", "task"], seed=7
    )
    assert list(body) == list(EXAMPLES["/ablation"]["answers"]["application/json"]["example"])
    assert (body["question_set"]["name"], body["question_set"]["items"]) == ("public", 3)
    counts = itemgetter("correct", "scored", "failed", "timed_out")
    assert list(body["variants"]) == ["task+crma", "task"]
    assert counts(body["variants"]["task+crma"]) == (3, 3, 0, 0)
    assert counts(body["variants"]["task"]) == (0, 3, 0, 0)
    assert body["comparisons"][0]["difference"] == 1
    assert body["items"][0]["outputs"]["task"] == {"text": "no", "correct": False}
    selections = {request.selection for request in served.engine.requests[1:]}
    assert {s.task_digest for s in selections} == {body["provenance"]["tasks"]["medical"]}
    assert {s.crma_digest for s in selections} == {body["provenance"]["crma"], None}
    assert body["provenance"]["base"] == BASE.digest
    assert all(request.sampling.temperature == 0 for request in served.engine.requests)
    interactive = [request.interactive for request in served.engine.requests]
    assert interactive == [True] + [False] * 6  # the first is the warm-up


async def test_a_sampled_items_seed_depends_on_neither_the_other_items_nor_the_repetition(
    served: Served,
) -> None:
    async def seeds(tasks: list[str] | None, *, repeat: bool) -> dict[Any, set[int | None]]:
        served.engine.requests.clear()
        options = {"tasks": tasks, "repeat": repeat, "variants": ["task", "task"]}
        await ablate(served, question_set="public", temperature=0.7, **options)
        assert {request.sampling.temperature for request in served.engine.requests} == {0.7}
        found: dict[Any, set[int | None]] = {}
        for request in served.engine.requests:
            item = request.selection.task_digest, request.prompt_ids
            found.setdefault(item, set()).add(request.sampling.seed)
        return found

    every_task = await seeds(None, repeat=True)
    assert [len(of_item) for of_item in every_task.values()] == [2] * 6
    assert len(set().union(*every_task.values())) == 12
    medical = await seeds(["medical"], repeat=True)
    assert len(medical) == 3
    assert medical.items() <= every_task.items()
    for item, of_item in (await seeds(["medical"], repeat=False)).items():
        assert len(of_item) == 1
        assert of_item < medical[item]


@pytest.mark.parametrize(("repeat", "num_requests"), [(False, 2), (True, 4)])
async def test_a_null_run_is_generated_again_only_if_repeat_is_set(
    served: Served, repeat: bool, num_requests: int
) -> None:
    served.engine.requests.clear()
    asked = [question(i) for i in range(2)]
    body = await ablate(served, questions=asked, variants=["task", "task"], repeat=repeat)
    assert list(body["variants"]) == ["task", "task#2"]
    assert len(served.engine.requests) == num_requests


@pytest.mark.parametrize(
    ("raw", "asked"), [(False, "<|im_start|>the<|im_end|>[answer]"), (True, "the<|im_end|>")]
)
async def test_every_variant_is_asked_in_the_format_of_the_task_or_in_none(
    served: Served, raw: bool, asked: str
) -> None:
    tokenizer = tiny.tokenizer()
    served.engine.requests.clear()
    item = question(question="the<|im_end|>")
    await ablate(served, questions=[item], variants=["task", "base"], raw=raw)
    texts = [tokenizer.decode(request.prompt_ids) for request in served.engine.requests]
    assert texts == [asked, asked]
    for request in served.engine.requests:
        assert request.prompt_ids.count(tokenizer.eos_token_id) == raw
        assert request.stop_token_ids == (tokenizer.eos_token_id,)


async def test_a_base_without_a_chat_template_is_ablated_raw_and_the_message_says_so(
    serve: Serve,
) -> None:
    served = await serve()
    served.app.state.frontend.registry.base_format = None
    asked = [question(task="unheard-of")]
    error = await ablate(served, 422, questions=asked, variants=["base"])
    assert (error["field"], error["allowed"]) == ("raw", True)
    assert "no chat template" in error["message"]
    body = await ablate(served, questions=asked, variants=["base"], raw=True)
    assert body["variants"]["base"]["scored"] == 1


@pytest.mark.parametrize(
    ("ending", "count"),
    [
        ((FinishReason.ABORT, "deadline"), "timed_out"),
        ((FinishReason.ERROR, "lost"), "failed"),
        ((FinishReason.ABORT, "lost"), "failed"),
    ],
)
async def test_a_late_or_failed_item_is_never_a_wrong_answer(
    served: Served, ending: tuple[FinishReason, str], count: str
) -> None:
    served.engine.fail_at_once = True
    served.engine.ending = ending
    body = await ablate(served, questions=[question()], variants=["task"])
    variant = body["variants"]["task"]
    assert (variant[count], variant["scored"], variant["accuracy"]) == (1, 0, None)


async def test_an_item_waits_for_room_in_the_queue_until_its_deadline(served: Served) -> None:
    served.engine.refusal = QueueFull(1, 0.001)

    def free() -> None:
        served.engine.refusal = None

    asyncio.get_running_loop().call_later(0.02, free)
    body = await ablate(served, questions=[question()], variants=["task"])
    assert body["variants"]["task"]["scored"] == 1
    served.engine.refusal = QueueFull(1, 5)
    body = await ablate(served, questions=[question()], variants=["task"], timeout_s=0.01)
    assert body["variants"]["task"]["timed_out"] == 1


async def test_all_ablations_together_respect_the_limit_on_items_in_the_engine(
    serve: Serve,
) -> None:
    served = await serve(max_ablation_inflight=2)
    asked = [question(i) for i in range(6)]
    both = [ablate(served, questions=asked, variants=["task"]) for _ in range(2)]
    await asyncio.gather(*both)
    assert served.engine.most_running == 2


async def test_choices_constrain_every_answer_and_are_part_of_the_provenance(
    served: Served,
) -> None:
    labels = ["one two", "three"]
    body = {"questions": [question()], "variants": ["task"], "choices": labels}
    answer = await ablate(served, **body)
    found = served.engine.requests[-1].sampling.constraint
    assert found is not None
    assert (found.kind, json.loads(found.source)) == (ConstraintKind.CHOICE, labels)
    assert answer["provenance"]["choices"] == labels
    await ablate(served, **body, provenance=answer["provenance"])
    changed = {**body, "choices": ["one two", "four"]}
    error = await ablate(served, 409, **changed, provenance=answer["provenance"])
    assert error["value"] == ["choices"]
    free = await ablate(served, questions=[question()], variants=["task"])
    assert "choices" not in free["provenance"]


async def test_own_choices_are_those_of_each_question(served: Served) -> None:
    items = [question(0, choices=["one two", "a"]), question(1, choices=["b", "one two"])]
    answer = await ablate(served, questions=items, variants=["task"], choices="own")
    constraints = [request.sampling.constraint for request in served.engine.requests[1:]]
    sources = [json.loads(each.source) for each in constraints if each is not None]
    assert sorted(sources) == [["b", "one two"], ["one two", "a"]]
    assert answer["provenance"]["choices"] == "own"


async def test_a_stopping_engine_ends_the_whole_ablation(served: Served) -> None:
    def stop_after_the_first(request: Request) -> str:
        served.engine.refusal = EngineStopped("stopping")
        return "one two"

    served.engine.answer = stop_after_the_first
    asked = [question(i) for i in range(40)]
    error = await ablate(served, 503, questions=asked, variants=["task"])
    assert error["code"] == "server_stopped"  # its first items had run
    assert served.engine.running == 0


REFUSED = [
    ({}, 422, "body"),
    ({"question_set": "public", "questions": [question()]}, 422, "body"),
    ({"question_set": "nowhere"}, 404, "question_set"),
    ({"question_set": "../public"}, 404, "question_set"),
    ({"question_set": "public", "tasks": ["finance"]}, 422, "tasks"),
    ({"questions": [question(), question()]}, 422, "questions[1].id"),
    ({"questions": [question(hint="x")]}, 422, "questions.0.hint"),
    ({"questions": [question(task="finance")]}, 404, "task"),
    ({"questions": [question(task="legal")]}, 409, "crma"),
    ({"questions": [question()], "variants": ["tasks"]}, 422, "variants.0"),
    ({"questions": [question()], "scorer": "vibes"}, 422, "scorer"),
    ({"questions": [question()], "tolerance": 1}, 422, "tolerance"),
    ({"questions": [question()], "scorer": "numeric"}, 422, "questions[0].answers[0]"),
    ({"questions": [question(answers=["(a"])], "scorer": "regex"}, 422, "questions[0].answers[0]"),
    (
        {"questions": [question()], "scorer": "choice", "background": True},
        422,
        "questions[0].choices",
    ),
    ({"questions": [question(choices=["a", "b"])], "scorer": "choice"}, 422, "questions.0"),
    ({"questions": [question()], "choices": ["one two"]}, 422, "choices"),
    ({"questions": [question()], "choices": ["one two", "one two"]}, 422, "choices"),
    ({"questions": [question()], "choices": "answers"}, 422, "choices"),
    ({"questions": [question()], "choices": ["three", "four"]}, 422, "choices"),
    ({"questions": [question()], "choices": "own"}, 422, "choices"),
    (
        {"questions": [question()], "choices": ["one two", "a"], "scorer": "perplexity"},
        422,
        "choices",
    ),
    ({"questions": [question()], "variants": ["task@v9"]}, 404, "task"),
    ({"questions": [question()], "variants": ["task", "task+crma@v9"]}, 404, "crma"),
    ({"questions": [question()], "provenance": {"base": "sha256:0"}}, 409, "provenance"),
]


@pytest.mark.parametrize(("body", "status", "field"), REFUSED)
async def test_a_request_that_cannot_be_met_is_refused_before_anything_runs(
    served: Served, body: Any, status: int, field: str
) -> None:
    error = await ablate(served, status, **body)
    assert error["field"] == field
    assert len(served.engine.requests) == 1  # the warm-up


async def test_an_ablation_over_the_direct_limit_is_told_to_run_in_the_background(
    serve: Serve,
) -> None:
    served = await serve(max_ablation_direct=1)
    error = await ablate(served, 422, questions=[question()], variants=["task", "base"])
    assert (error["field"], error["value"]) == ("questions", 2)
    assert error["allowed"] == "<= 1 item-variants"
    assert '"background": true' in error["message"]
