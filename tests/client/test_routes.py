"""Every route has a method in both clients, or stands here with the reason why it has none."""

import re
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
import pytest
from client_methods import public_methods
from crma_client import AsyncClient, Client, CrmaClientError
from route_rules import RULES


class Call(NamedTuple):
    """A call of a client that asks a route."""

    method: str
    arguments: tuple[Any, ...] = ()


CALLS = {
    "POST /generate": Call("generate", ("Hi",)),
    "POST /v1/chat/completions": Call("chat", ([],)),
    "POST /tokenize": Call("tokenize", ("Hi",)),
    "POST /detokenize": Call("detokenize", ([1],)),
    "POST /ablation": Call("ablation"),
    "GET /ablation": Call("ablation_jobs"),
    "GET /ablation/{id}": Call("ablation_job", ("abl/1",)),
    "GET /ablation/{id}/events": Call("wait_for_ablation", ("abl/1",)),
    "DELETE /ablation/{id}": Call("cancel_ablation", ("abl/1",)),
    "GET /question_sets": Call("question_sets"),
    "GET /question_sets/{name}": Call("question_set", ("a/b",)),
    "PUT /question_sets/{name}": Call("upload_question_set", ("a/b", b"")),
    "DELETE /question_sets/{name}": Call("delete_question_set", ("a/b",)),
    "GET /adapters": Call("adapters"),
    "GET /adapters/{task}": Call("adapter", ("a/b",)),
    "DELETE /adapters/{task}": Call("delete_adapter", ("a/b@v1",)),
    "POST /adapters/{task}/rollback": Call("roll_back_adapter", ("a/b",)),
    "POST /adapters/{task}/load": Call("load_adapter", ("a/b@v1",)),
    "POST /adapters/{task}/unload": Call("unload_adapter", ("a/b@v1", "wait")),
    "POST /adapters/{task}/pin": Call("pin_adapter", ("a/b@v1",)),
    "POST /adapters/{task}/unpin": Call("unpin_adapter", ("a/b@v1",)),
    "POST /v1/unload_lora_adapter": Call("stop_adapter", ("a",)),
    "GET /backbones": Call("backbones"),
    "POST /backbones/{version}/promote": Call("promote_backbone", ("a/b",)),
    "GET /backbones/promotion": Call("promotion"),
    "DELETE /backbones/promotion": Call("cancel_promotion"),
    "POST /backbones/rollback": Call("roll_back_backbone"),
    "GET /usage": Call("usage"),
    "GET /audit": Call("audit"),
    "GET /runs": Call("runs"),
    "GET /runs/{id:path}": Call("run", ("full/one",)),
    "GET /metrics": Call("metrics"),
    "GET /healthz": Call("health"),
    "GET /readyz": Call("ready"),
    "GET /version": Call("version"),
}
OPENAI = "OpenAI's: clients of OpenAI's call it, and another method gives the same"
VLLM = "vLLM's: for vLLM's tools"
WITHOUT = {
    "POST /v1/completions": OPENAI,
    "POST /v1/responses": OPENAI,
    "GET /v1/models": OPENAI,
    "GET /v1/models/{model}": OPENAI,
    "POST /v1/load_lora_adapter": VLLM,
    "GET /health": VLLM,
    "POST /adapters": "needs a folder: test_real_app.py uploads one",
    "GET /ping": "SageMaker's",
    "POST /ping": "SageMaker's",
    "GET /": "the page",
    "GET /page/{path:path}": "the page",
    "GET /docs": "for people",
    "GET /docs/oauth2-redirect": "for people",
    "GET /static-offline-docs": "for people",
    "GET /openapi.json": "for tools that make clients",
}
MORE = {"close", "stream", "stream_chat", "run_ablation", "upload_adapter"}
"""Methods that ask a route of CALLS in another way, or none, or one of WITHOUT."""


def asks(route: str, request: httpx.Request) -> bool:
    """Whether a request is for a route; what is filled into its path has no slash of its own."""
    method, path = route.split(" ")
    path = re.sub(r"\{\w+:path\}", ".+", path)
    pattern = re.sub(r"\{\w+\}", "[^/]+", path)
    target = request.url.raw_path.decode().partition("?")[0]
    return request.method == method and re.fullmatch(pattern, target) is not None


def test_every_route_has_a_method_or_a_reason_and_every_method_a_route() -> None:
    assert set(CALLS) | set(WITHOUT) == set(RULES)
    assert set(CALLS).isdisjoint(WITHOUT)
    assert {call.method for call in CALLS.values()} | MORE == set(public_methods(Client))


@pytest.mark.parametrize("route", CALLS)
async def test_a_method_of_either_client_asks_its_route(route: str) -> None:
    """Names with a slash stay one part of the path."""
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json=[])  # no method can read it but those that list

    call = CALLS[route]
    transport = httpx.MockTransport(answer)
    with suppress(CrmaClientError), Client(transport=transport) as client:
        getattr(client, call.method)(*call.arguments)
    with suppress(CrmaClientError):
        async with AsyncClient(transport=transport) as awaited:
            await getattr(awaited, call.method)(*call.arguments)
    assert sum(asks(route, request) for request in requests) == 2
