"""POST /ablation: which generations run, what counts as an answer, and that it leaves room for others."""

import asyncio
from typing import Any

import pytest
from api import BASE, Serve, Served

from server.engine.errors import EngineStopped, QueueFull
from server.engine.request import FinishReason, Request
from server.http.schemas import EXAMPLES


def question(i: int = 0, **change: Any) -> dict[str, Any]:
    return {
        "id": f"q{i}",
        "task": "medical",
        "question": "Which?",
        "answers": ["one two"],
        **change,
    }


async def ablate(served: Served, status: int = 200, **body: Any) -> dict[str, Any]:
    response = await served.client.post("/ablation", json=body)
    assert response.status_code == status, response.text
    return response.json() if status == 200 else response.json()["error"]


async def test_the_answer_is_as_the_contract_says(served: Served) -> None:
    served.engine.answer = lambda request: "one two" if request.selection.crma_digest else "no"
    body = await ablate(
        served, question_set="public", tasks=["medical"], variants=["task+crma", "task"], seed=7
    )
    assert list(body) == list(EXAMPLES["/ablation"]["answers"]["application/json"]["example"])
    assert (body["question_set"]["name"], body["question_set"]["items"]) == ("public", 3)
    counts = [
        (name, v["correct"], v["scored"], v["failed"], v["timed_out"])
        for name, v in body["variants"].items()
    ]
    assert counts == [("task+crma", 3, 3, 0, 0), ("task", 0, 3, 0, 0)]
    assert body["comparisons"][0]["difference"] == 1
    assert body["items"][0]["outputs"]["task"] == {"text": "no", "correct": False}
    selections = {request.selection for request in served.engine.requests[1:]}
    assert {s.task_digest for s in selections} == {body["provenance"]["tasks"]["medical"]}
    assert {s.crma_digest for s in selections} == {body["provenance"]["crma"], None}
    assert body["provenance"]["base"] == BASE.digest
    assert all(request.sampling.temperature == 0 for request in served.engine.requests)
    assert [request.interactive for request in served.engine.requests] == [True] + [
        False
    ] * 6  # the warm-up


async def test_each_sampled_item_has_a_seed_of_its_own_that_neither_other_items_nor_a_repetition_change(
    served: Served,
) -> None:
    seeds = []
    for tasks, repeat in ((["medical"], True), (None, True), (["medical"], False)):
        served.engine.requests.clear()
        options: dict[str, Any] = {
            "tasks": tasks,
            "repeat": repeat,
            "temperature": 0.7,
            "variants": ["task", "task"],
        }
        await ablate(served, question_set="public", **options)
        seeds.append([request.sampling.seed for request in served.engine.requests])
    assert len(set(seeds[1])) == len(seeds[1]) == 12
    assert (seeds[0], seeds[2]) == (seeds[1][:6], seeds[1][:6:2])
    assert {request.sampling.temperature for request in served.engine.requests} == {0.7}


async def test_a_null_run_is_generated_once_and_twice_if_told(served: Served) -> None:
    for repeat, num_requests in ((False, 2), (True, 4)):
        served.engine.requests.clear()
        asked = [question(i) for i in range(2)]
        body = await ablate(served, questions=asked, variants=["task", "task"], repeat=repeat)
        assert (list(body["variants"]), len(served.engine.requests)) == (
            ["task", "task#2"],
            num_requests,
        )


async def test_a_late_or_failed_item_is_no_wrong_answer(served: Served) -> None:
    served.engine.fail_at_once = True
    for ending, count in (
        ((FinishReason.ABORT, "deadline"), "timed_out"),
        ((FinishReason.ERROR, "lost"), "failed"),
    ):
        served.engine.ending = ending
        variant = (await ablate(served, questions=[question()], variants=["task"]))["variants"][
            "task"
        ]
        assert (variant[count], variant["scored"], variant["accuracy"]) == (1, 0, None)


async def test_a_full_queue_is_waited_out_until_the_items_deadline(served: Served) -> None:
    served.engine.refusal = QueueFull(1, 0.001)

    def free() -> None:
        served.engine.refusal = None

    asyncio.get_running_loop().call_later(0.02, free)
    assert (await ablate(served, questions=[question()], variants=["task"]))["variants"]["task"][
        "scored"
    ] == 1
    served.engine.refusal = QueueFull(1, 5)
    body = await ablate(served, questions=[question()], variants=["task"], timeout_s=0.01)
    assert body["variants"]["task"]["timed_out"] == 1


async def test_few_items_are_in_the_engine_at_once(serve: Serve) -> None:
    served = await serve(max_ablation_inflight=2)
    await asyncio.gather(
        *(
            ablate(served, questions=[question(i) for i in range(6)], variants=["task"])
            for _ in "ab"
        )
    )
    assert served.engine.most_running == 2


async def test_a_stopping_engine_ends_the_whole_ablation(served: Served) -> None:
    def stop_at_second(request: Request) -> str:
        served.engine.refusal = EngineStopped("stopping")
        return "one two"

    served.engine.answer = stop_at_second
    error = await ablate(served, 503, questions=[question(i) for i in range(40)], variants=["task"])
    assert error["code"] == "draining"
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
    ({"questions": [question()], "variants": ["task@v9"]}, 404, "task"),
    ({"questions": [question()], "variants": ["task", "task+crma@v9"]}, 404, "crma"),
    ({"questions": [question()], "provenance": {"base": "sha256:0"}}, 409, "provenance"),
]


@pytest.mark.parametrize(("body", "status", "field"), REFUSED)
async def test_what_cannot_be_asked_is_refused_at_once(
    served: Served, body: Any, status: int, field: str
) -> None:
    assert (await ablate(served, status, **body))["field"] == field
    assert len(served.engine.requests) == 1  # the warm-up


async def test_the_limit_is_named_and_what_would_be_beyond_it(serve: Serve) -> None:
    served = await serve(max_ablation_direct=1)
    error = await ablate(served, 422, questions=[question()], variants=["task", "base"])
    assert (error["field"], error["value"], error["allowed"]) == (
        "questions",
        2,
        "<= 1 item-variants",
    )
    assert '"background": true' in error["message"]
