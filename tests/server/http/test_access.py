"""Every route with every credential; and what does not exist for a key."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import api_keys
import httpx
import pytest
import tiny
from api import Serve, Served
from api_keys import Headers, bearer
from route_rules import ANY, RULES, Rule, named

from crma.access.key_file import KeyFile
from crma.access.scope import Scope
from crma.store.adapter_store import AdapterStore
from crma.store.manifest import TASK_FILES
from server.engine.request import Request

WEIGHTS = TASK_FILES[1]
NONE: Headers = {}
JSON = {"content-type": "application/json"}


@dataclass
class Keyed:
    """A server with a key for each scope, and what to send to be each caller."""

    served: Served
    keys: dict[str, Headers]

    async def status(self, method: str, path: str, headers: Headers, body: Any = None) -> int:
        return (await self.send(method, path, headers, body)).status_code

    async def send(
        self, method: str, path: str, headers: Headers, body: Any = None
    ) -> httpx.Response:
        content = json.dumps({} if body is None else body)
        return await self.served.client.request(
            method, path, content=content, headers={**JSON, **headers}
        )


@pytest.fixture
async def keyed(serve: Serve, tmp_path: Path) -> Keyed:
    file = tmp_path / "keys.json"
    keys = {scope: api_keys.add(file, f"only-{scope}", scope) for scope in Scope}
    served = await serve(
        keys_file=file, api_keys="env", admin_key="root", evaluations=tmp_path / "evaluations"
    )
    return Keyed(served, {**keys, "env": bearer("env"), "root": bearer("root")})


HELD = {**{scope: {scope} for scope in Scope}, "env": {"generate", "ablate"}, "root": set(Scope)}


def expected(rule: Rule, held: set[str] | None, is_restricted: bool) -> int | None:
    """401, 403, or None: the route is open. `held`: the scopes of a key; None without one."""
    if not rule.scopes or (rule.only_if_restricted and not is_restricted):
        return None
    if held is None:
        return 401
    return None if held & set(rule.scopes) else 403


def path_of(route: str) -> tuple[str, str]:
    """The method, and a path on which nothing is."""
    method, path = route.split(" ")
    for name in ("{id}", "{model}", "{name}", "{task}", "{version}"):
        path = path.replace(name, "nothing")
    return method, path


async def test_every_route_has_a_rule(keyed: Keyed) -> None:
    """A new route needs a line in tests/route_rules.py."""
    assert named(keyed.served.app.routes) == set(RULES)


@pytest.mark.parametrize("is_restricted", [False, True], ids=["all tasks", "restricted"])
async def test_every_route_opens_for_the_scopes_of_its_rule_only(
    keyed: Keyed, is_restricted: bool, tmp_path: Path
) -> None:
    credentials = {"none": NONE, "unknown": bearer("unknown"), **keyed.keys}
    if is_restricted:
        file = tmp_path / "keys.json"
        credentials["restricted"] = api_keys.add(file, "restricted", tasks=["legal"])
        keyed.served.app.state.frontend.keys.refresh()
    held: dict[str, set[str]] = {**HELD, "restricted": {"generate"}}
    wrong = []
    for route, rule in RULES.items():
        for name, headers in credentials.items():
            status = await keyed.status(*path_of(route), headers)
            meant = expected(rule, held.get(name), is_restricted)
            if status != meant if meant else status in (401, 403, 500):
                wrong.append((route, name, status, meant))
    assert not wrong


async def test_without_keys_everything_but_admin_routes_is_open(serve: Serve) -> None:
    served = Keyed(await serve(), {})
    for route, rule in RULES.items():
        status = await served.status(*path_of(route), bearer("x"))
        assert (status == 403) == (rule.scopes == ("admin",) or rule.needs_owner), route
        assert status not in (401, 421, 500), route


async def test_refusals_say_which_scope_is_needed_and_which_are_held(keyed: Keyed) -> None:
    answer = await keyed.send("POST", "/generate", keyed.keys["ablate"])
    error = answer.json()["error"]
    assert error["code"] == "forbidden"
    assert "for generate" in error["message"]
    assert "this one is for ablate" in error["message"]


# Tasks -----------------------------------------------------------------------------------------

RESTRICTED_BODIES: dict[str, Any] = {
    "/generate": {"prompt": "Hi", "task": "NAME"},
    "/v1/completions": {"prompt": "Hi", "model": "NAME"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "model": "NAME"},
    "/v1/responses": {"input": "Hi", "model": "NAME"},
    "/tokenize": {"prompt": "Hi", "model": "NAME"},
    "/detokenize": {"tokens": [1], "model": "NAME"},
    "/ablation": {
        "questions": [{"id": "1", "task": "NAME", "question": "Which?", "answers": ["x"]}],
        "variants": ["task"],
    },
}


@pytest.fixture
async def restricted(serve: Serve, tmp_path: Path) -> Keyed:
    """A server whose key `narrow` has one of its two tasks."""
    file = tmp_path / "keys.json"
    keys = {
        "narrow": api_keys.add(file, "narrow", "generate", "ablate", tasks=["medical"]),
        "wide": api_keys.add(file, "wide", *ANY),
        "metrics": api_keys.add(file, "metrics", "metrics"),
    }
    return Keyed(await serve(keys_file=file, evaluations=tmp_path / "evaluations"), keys)


@pytest.mark.parametrize("path", RESTRICTED_BODIES)
@pytest.mark.parametrize("suffix", ["", "@v1", "@v9"])
async def test_a_forbidden_task_answers_as_an_unknown_one_to_the_byte(
    restricted: Keyed, path: str, suffix: str
) -> None:
    text = json.dumps(RESTRICTED_BODIES[path])
    if path == "/ablation" and suffix:
        text = text.replace('"task"]', f'"task{suffix}"]')

    async def ask(name: str, key: str) -> httpx.Response:
        named_task = name if path == "/ablation" else name + suffix
        body = json.loads(text.replace("NAME", named_task))
        return await restricted.send("POST", path, restricted.keys[key], body)

    forbidden, unknown = await ask("legal", "narrow"), await ask("lxgal", "narrow")
    assert forbidden.status_code == 404, forbidden.text
    assert forbidden.text.replace("legal", "lxgal") == unknown.text
    ids = "x-request-id"
    assert {k: v for k, v in forbidden.headers.items() if k != ids} == {
        k: v for k, v in unknown.headers.items() if k != ids
    }
    assert "legal" not in unknown.text
    if suffix != "@v9":
        assert (await ask("legal", "wide")).status_code == 200
        assert (await ask("medical", "narrow")).status_code == 200


async def test_a_variant_without_the_adapter_does_not_use_a_forbidden_tasks_prompt_format(
    restricted: Keyed,
) -> None:
    """The base model is asked in the format of the question's task, which is the task's secret."""

    async def prompt(task: str, key: str) -> tuple[int, ...]:
        text = json.dumps(RESTRICTED_BODIES["/ablation"]).replace("NAME", task)
        body = {**json.loads(text), "variants": ["base"]}
        answer = await restricted.send("POST", "/ablation", restricted.keys[key], body)
        assert answer.status_code == 200
        return restricted.served.engine.requests[-1].prompt_ids

    assert await prompt("legal", "narrow") == await prompt("lxgal", "narrow")
    assert await prompt("legal", "wide") != await prompt("lxgal", "wide")


async def test_lists_have_the_tasks_of_the_key_only(restricted: Keyed) -> None:
    async def get(path: str, key: str) -> Any:
        return (await restricted.send("GET", path, restricted.keys[key])).json()

    for key, tasks in (("narrow", ["medical"]), ("wide", ["legal", "medical"])):
        models = [each["id"] for each in (await get("/v1/models", key))["data"]]
        assert models == ["base", *tasks]
        assert [each["name"] for each in (await get("/adapters", key))["tasks"]] == tasks
    one = await restricted.send("GET", "/v1/models/legal", restricted.keys["narrow"])
    assert one.status_code == 404
    assert "legal" not in (await get("/v1/models/x", "narrow"))["error"]["message"]


async def test_metrics_and_problems_show_names_only_to_whom_they_exist_for(
    serve: Serve, own: AdapterStore, tmp_path: Path
) -> None:
    for task in ("legal", "medical"):
        tiny.flip_bit(own.root / "tasks" / task / "v1" / WEIGHTS)
    file = tmp_path / "keys.json"
    keys = {
        "narrow": api_keys.add(file, "narrow", tasks=["medical"]),
        "wide": api_keys.add(file, "wide"),
        "metrics": api_keys.add(file, "metrics", "metrics"),
    }
    keyed = Keyed(await serve(keys_file=file, store=own.root), keys)
    shown = {}
    for name, headers in {"nobody": NONE, **keys}.items():
        shown[name] = set((await keyed.send("GET", "/readyz", headers)).json()["problems"])
    both = {"legal", "medical"}
    assert shown == {"nobody": set(), "narrow": {"medical"}, "wide": both, "metrics": both}
    statuses = {name: await keyed.status("GET", "/metrics", keys[name]) for name in keys}
    assert statuses == {"narrow": 403, "wide": 403, "metrics": 200}


# What belongs to a key -------------------------------------------------------------------------


async def test_a_job_exists_for_its_key_and_for_admins_only(serve: Serve, tmp_path: Path) -> None:
    """Whoever knew the id of a job read its questions and answers, and could cancel it."""
    file = tmp_path / "keys.json"
    keys = {name: api_keys.add(file, name, "ablate") for name in ("mine", "other")}
    keys["boss"] = api_keys.add(file, "boss", "ablate", "admin")
    jobs: list[str] = []
    for _ in range(2):  # also after the server has started again
        keyed = Keyed(await serve(keys_file=file), keys)
        if not jobs:
            body = {"question_set": "public", "variants": ["task"], "background": True}
            started = await keyed.send("POST", "/ablation", keys["mine"], body)
            jobs = [started.json()["id"]]
            await keyed.send("GET", f"/ablation/{jobs[0]}/events", keys["mine"])
        listed = {
            name: len((await keyed.send("GET", "/ablation", keys[name])).json()) for name in keys
        }
        assert listed == {"mine": 1, "other": 0, "boss": 1}
        unknown = "abl-" + "0" * 32
        for method, end in (("GET", ""), ("GET", "/events"), ("DELETE", "")):
            answers = {}
            for name in keys:
                answers[name] = await keyed.send(method, f"/ablation/{jobs[0]}{end}", keys[name])
            statuses = [each.status_code for each in answers.values()]
            assert statuses == [200, 404, 200]
            missing = await keyed.send(method, f"/ablation/{unknown}{end}", keys["other"])
            assert answers["other"].text.replace(jobs[0], unknown) == missing.text
        await keyed.served.stop()


async def test_a_question_set_exists_for_its_key_only_and_one_of_an_admin_for_all(
    serve: Serve, tmp_path: Path
) -> None:
    """A key could upload none, and everything uploaded was everyone's."""
    file = tmp_path / "keys.json"
    keys = {name: api_keys.add(file, name, "ablate") for name in ("mine", "other")}
    keys["boss"] = api_keys.add(file, "boss", "ablate", "admin")
    keyed = Keyed(await serve(keys_file=file), keys)

    def line(id: str) -> dict[str, Any]:
        return {"id": id, "task": "medical", "question": "Which?", "answers": ["x"]}

    async def seen(name: str) -> dict[str, str]:
        listed = (await keyed.send("GET", "/question_sets", keys[name])).json()
        return {each["name"]: each["source"] for each in listed if each["name"] != "public"}

    async def asked(name: str, question_set: str) -> str | int:
        body = {"question_set": question_set, "variants": ["base"]}
        answer = await keyed.send("POST", "/ablation", keys[name], body)
        return answer.json()["items"][0]["id"] if answer.is_success else answer.status_code

    sent = await keyed.send("PUT", "/question_sets/a", keys["mine"], line("mine"))
    assert (sent.status_code, sent.json()["source"]) == (200, "own")
    assert (await seen("mine"), await seen("other")) == ({"a": "own"}, {})
    assert (await asked("mine", "a"), await asked("other", "a")) == ("mine", 404)
    sent = await keyed.send("PUT", "/question_sets/a", keys["boss"], line("boss"))
    assert sent.json()["source"] == "shared"
    assert (await seen("mine"), await seen("other")) == ({"a": "own"}, {"a": "shared"})
    assert (await asked("mine", "a"), await asked("other", "a")) == ("mine", "boss")
    for name, status in (("other", 404), ("mine", 200), ("mine", 404), ("boss", 200)):
        assert await keyed.status("DELETE", "/question_sets/a", keys[name]) == status, name
    assert [await seen(name) for name in keys] == [{}, {}, {}]


async def test_a_key_keeps_no_more_question_sets_than_it_may(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = {name: api_keys.add(file, name, "ablate") for name in ("mine", "other")}
    keyed = Keyed(await serve(keys_file=file, max_question_sets=2), keys)
    line = {"id": "1", "task": "medical", "question": "Which?", "answers": ["x"]}

    async def put(name: str, key: str = "mine") -> int:
        return await keyed.status("PUT", f"/question_sets/{name}", keys[key], line)

    assert [await put(name) for name in ("a", "b", "c", "a")] == [200, 200, 409, 200]
    assert await put("c", "other") == 200
    await keyed.status("DELETE", "/question_sets/a", keys["mine"])
    assert await put("c") == 200


async def test_work_of_a_key_ends_when_it_is_revoked(serve: Serve, tmp_path: Path) -> None:
    """A job of a revoked key went on to its last item."""
    file = tmp_path / "keys.json"
    mine, boss = api_keys.add(file, "mine", "ablate"), api_keys.add(file, "boss", *ANY)
    keyed = Keyed(await serve(keys_file=file, max_ablation_inflight=1), {})

    def revoke(_: Request) -> str:
        if "mine" in {key.name for key in KeyFile(file).read()}:
            KeyFile(file).revoke("mine")
            keyed.served.app.state.frontend.keys.refresh()
        return "one two"

    keyed.served.engine.answer = revoke
    body = {"question_set": "public", "variants": ["base"], "background": True}
    job = (await keyed.send("POST", "/ablation", mine, body)).json()["id"]
    await keyed.send("GET", f"/ablation/{job}/events", boss)
    record = (await keyed.send("GET", f"/ablation/{job}", boss)).json()
    assert record["status"] == "failed"
    assert "not for ablate any more" in record["error"]


async def test_requests_carry_their_key_and_its_tenant_to_the_engine(
    serve: Serve, tmp_path: Path
) -> None:
    file = tmp_path / "keys.json"
    keys = [api_keys.add(file, name, *ANY, tenant=t) for name, t in (("a", "t"), ("b", "t"))]
    keys.append(api_keys.add(file, "c", *ANY))
    keyed = Keyed(await serve(keys_file=file), {})
    ablation = {"question_set": "public", "variants": ["base"]}
    for headers in keys:
        await keyed.send("POST", "/generate", headers, {"prompt": "Hi"})
        await keyed.send("POST", "/ablation", headers, ablation)
    requests = keyed.served.engine.requests[1:]  # the first is the warm-up
    seen = {(request.owner, request.cache_salt) for request in requests}
    assert {owner for owner, _ in seen} == {"a", "b", "c"}
    salts = dict(seen)
    assert len(seen) == 3
    assert salts["a"] == salts["b"] != salts["c"]
