"""Replicas on Ray Serve: one server whose engine is two processes, on a Ray cluster of its own.

They need the extra `ray`, and are skipped without it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
from command_line import crma
from ray_cluster import LONG, TASKS, Cluster, Load, needs_ray, running, tiny_settings

from crma.training.experiment import read_experiment

pytestmark = [pytest.mark.e2e, needs_ray]
SEEN_SECONDS = 2.0  # a promotion, by all requests, as docs/replicas.md says
SETTLED_SECONDS = 10.0  # until the ingress has seen how its replicas are


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with running(folder, tiny_settings(folder), replicas=2) as served:
        served.wait_until("replicas", 2.0)
        yield served


@pytest.fixture
async def alone(cluster: Cluster, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """The same server with an engine of its own."""
    settings = {"max_model_len": 400, "evaluations": tmp_path, "kernel": "off"}
    async with tiny.serving(cluster.base, cluster.store.root, **settings) as app:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://test", headers={"Authorization": "Bearer admin"}
        ) as client:
            yield client


async def test_each_request_gets_what_one_engine_gives_it_alone(
    cluster: Cluster, alone: httpx.AsyncClient
) -> None:
    asked = [
        {"prompt": f"naïve {number}", "task": task, "max_tokens": 12, "seed": number, **options}
        for number, task in enumerate((None, *TASKS) * 3)
        for options in ({"logprobs": True}, {"temperature": 1.2}, {"n": 2, "temperature": 0.8})
    ]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda body: cluster.generate(**body), asked))
    for body, answer in zip(asked, together, strict=True):
        options = {"raw": True, "ignore_eos": True}
        expected = (await alone.post("/generate", json={**body, **options})).json()
        for key in ("text", "finish_reason", "choices", "usage"):
            if key != "usage":
                assert answer.get(key) == expected.get(key)
        assert answer["provenance"] == expected["provenance"]
        if "logprobs" in body:
            assert answer["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-4)


async def test_a_stream_has_a_token_an_event(cluster: Cluster) -> None:
    body = {"prompt": "one", "max_tokens": 8, "raw": True, "ignore_eos": True}
    whole = cluster.generate(**body)["text"]
    response = cluster.client.post("/generate", json={**body, "stream": True})
    events = [line for line in response.text.splitlines() if line.startswith("event: ")]
    assert events == [*["event: token"] * 8, "event: done"]
    texts = [json.loads(line[6:]).get("text", "") for line in response.text.splitlines()[1::3]]
    assert "".join(texts) == whole
    assert response.headers.get_list("X-Request-Id") == [response.headers["X-Request-Id"]]


async def test_an_ablation_is_that_of_one_engine(
    cluster: Cluster, alone: httpx.AsyncClient
) -> None:
    body = {"question_set": "public", "variants": ["base", "task"], "seed": 7}
    answer = cluster.client.post("/ablation", json=body).json()
    expected = (await alone.post("/ablation", json=body)).json()
    assert answer["variants"]["task"]["failed"] == 0
    for variant, of in expected["variants"].items():
        assert answer["variants"][variant]["by_task"] == of["by_task"]


def test_prompts_of_one_request_run_at_once(cluster: Cluster) -> None:
    """All but one waited for ever: Serve took them for one call."""
    body = {"model": "base", "prompt": [f"one {number}" for number in range(8)], "max_tokens": 4}
    answer = cluster.client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 8


def test_an_adapter_that_cannot_be_had_is_refused_as_by_one_engine(cluster: Cluster) -> None:
    asked = {"prompt": "one", "raw": True, "max_tokens": 2}
    unknown = cluster.client.post("/generate", json={**asked, "task": "physics"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
    too_long = cluster.client.post("/generate", json={**asked, "max_tokens": 4000})
    assert too_long.json()["error"]["code"] == "context_length_exceeded"
    pattern = cluster.client.post(
        "/generate", json={**asked, "structured_outputs": {"regex": "(a|b"}}
    )
    assert pattern.json()["error"]["code"] == "invalid_constraint"


def test_requests_go_where_their_adapters_are_in_memory(
    cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    num_loads = loads_of_selections_in_turn(cluster)
    record_property("loads", num_loads)
    assert num_loads == 0


def test_without_affinity_adapters_are_loaded_again_and_again(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Two of the three adapters have room in a replica, and both replicas get all requests."""
    settings = {**tiny_settings(tmp_path), "max_loaded_adapters": 2}
    with running(tmp_path, settings, replicas=2, affinity=False) as served:
        served.wait_until("replicas", 2.0)
        num_loads = loads_of_selections_in_turn(served)
    record_property("loads", num_loads)
    assert num_loads > 6


def loads_of_selections_in_turn(cluster: Cluster) -> float:
    """How many adapters are loaded for twelve requests, once each selection was asked for."""
    selections = [("medical", False), ("legal", False), ("medical", True)]
    loads = []
    for number in range(15):
        task, crma = selections[number % 3]
        loads.append(cluster.value("adapter_load_seconds_count"))
        cluster.generate(prompt=f"one {number}", task=task, crma=crma, max_tokens=2)
    return cluster.value("adapter_load_seconds_count") - loads[3]


def test_metrics_are_the_sums_of_the_replicas(cluster: Cluster) -> None:
    names = ("generation_tokens_total", "num_requests_running", "num_requests_waiting")
    with ThreadPoolExecutor(8) as threads:
        bodies = [{"prompt": f"{number}", "max_tokens": 40} for number in range(8)]
        list(threads.map(lambda body: cluster.generate(**body), bodies))
    until = time.monotonic() + SETTLED_SECONDS
    while any(sums(cluster, name)[0] != sums(cluster, name)[1] for name in names):
        assert time.monotonic() < until, [sums(cluster, name) for name in names]
    assert all(each > 0 for each in cluster.measured("replica_generation_tokens_total"))
    assert cluster.value("kv_cache_usage_perc") == pytest.approx(
        sum(cluster.measured("replica_kv_cache_usage_perc")) / 2
    )


def sums(cluster: Cluster, name: str) -> tuple[float, float]:
    """A metric of the server, and the sum over its replicas."""
    return cluster.value(name), sum(cluster.measured(f"replica_{name}"))


def test_a_promotion_and_a_roll_back_reach_both_replicas(cluster: Cluster) -> None:
    def digests() -> set[str]:
        """Of the task that eight requests at once got."""
        bodies = [{"prompt": f"{number}", "task": "legal", "max_tokens": 60} for number in range(8)]
        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(lambda body: cluster.generate(**body), bodies))
        return {answer["provenance"]["task"] for answer in answers}

    def seen(digest: str) -> None:
        """Both replicas answer with a version that was made the serving one a moment ago."""
        until = time.monotonic() + SEEN_SECONDS
        while time.monotonic() < until:
            digests()
        before = cluster.measured("replica_generation_tokens_total")
        assert digests() == {digest}
        after = cluster.measured("replica_generation_tokens_total")
        assert all(later > earlier for later, earlier in zip(after, before, strict=True)), "both"

    (old,) = digests()
    seen(tiny.publish(cluster.store, cluster.base, "legal", 7).digest)
    assert cluster.client.post("/adapters/legal/rollback").status_code == 200
    seen(old)


def test_a_pinned_adapter_is_in_both_replicas(cluster: Cluster) -> None:
    assert cluster.client.post("/adapters/legal/pin").status_code == 200
    adapters = cluster.client.get("/adapters").json()["tasks"]
    assert {each["name"]: each["resident"] for each in adapters}["legal"]
    assert cluster.client.post("/adapters/legal/unpin").status_code == 200


def test_a_replica_that_is_killed_loses_nothing_that_has_not_begun(cluster: Cluster) -> None:
    body = {"prompt": "one", "max_tokens": LONG, "raw": True, "ignore_eos": True}
    expected = cluster.generate(**body)["text"]
    first, _ = cluster.engines()

    def stream(threads: ThreadPoolExecutor) -> Any:
        """A stream that has begun, and what its last event will be."""
        opened = cluster.client.stream("POST", "/generate", json={**body, "stream": True})
        response = opened.__enter__()
        lines = response.iter_lines()
        assert next(lines) == "event: token"

        def last() -> str:
            events = [line for line in lines if line.startswith(("event: ", "data: "))]
            opened.__exit__(None, None, None)
            name, data = events[-2:]
            return name if name == "event: done" else json.loads(data[6:])["error"]["code"]

        return threads.submit(last)

    with ThreadPoolExecutor(16) as threads:
        wholes = [threads.submit(cluster.generate, **body) for _ in range(6)]
        streams = [stream(threads) for _ in range(6)]
        os.kill(first, signal.SIGKILL)
        assert [each.result()["text"] for each in wholes] == [expected] * 6
        endings = [each.result() for each in streams]
    assert set(endings) == {"event: done", "replica_lost"}
    assert cluster.value("requests_lost_total") == endings.count("replica_lost")
    assert cluster.value("requests_retried_total") > 0
    assert cluster.generate(**body)["text"] == expected
    cluster.wait_until("replicas", 2.0)
    assert first not in cluster.engines()


def test_load_goes_on_while_a_replica_is_killed_and_replaced(
    cluster: Cluster, record_property: Callable[[str, object], None]
) -> None:
    lost, retried = cluster.value("requests_lost_total"), cluster.value("requests_retried_total")
    first, _ = cluster.engines()
    with Load(cluster, 8, max_tokens=100) as load:
        while min(load.num_ended("whole"), load.num_ended("stream")) < 8:
            assert cluster.client.get("/readyz").status_code == 200
        os.kill(first, signal.SIGKILL)
        cluster.wait_until("replicas", 1.0)
        cluster.wait_until("replicas", 2.0)
    broken = load.endings["stream", "replica_lost"]
    num_retried = cluster.value("requests_retried_total") - retried
    record_property("endings", {" ".join(key): count for key, count in load.endings.items()})
    record_property("retried", num_retried)
    assert load.endings["whole", "done"] == load.num_ended("whole")
    assert load.endings["stream", "done"] == load.num_ended("stream") - broken
    assert cluster.value("requests_lost_total") - lost == broken
    assert num_retried + broken > 0  # which of the two the killed replica had, is chance


def test_a_configuration_that_cannot_be_used_ends_the_process_with_code_2(tmp_path: Path) -> None:
    config = tmp_path / "replicas.yaml"
    config.write_text("settings: {max_seqs: 4}\n")
    ended = subprocess.run(
        [sys.executable, "-m", "server.ray", str(config)], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("settings.max_seqs is not a setting")


# `crma experiment --ray` ------------------------------------------------------------------------


@pytest.fixture
def own_cluster() -> Iterator[None]:
    """A small cluster of this process, which the command finds."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("default")  # Ray's own are no warnings of ours
@pytest.mark.usefixtures("own_cluster")
def test_an_experiment_makes_a_record_a_run_on_the_cluster_and_resumes(
    write_task: Any, tmp_path: Path
) -> None:
    base = tiny.pulled_base(tmp_path)
    write_task(tmp_path / "first", ("yes", "no"))
    write_task(tmp_path / "second", ("up", "down"))
    tasks = [str(tmp_path / task) for task in ("first", "second")]
    config = tmp_path / "try.toml"
    config.write_text(
        'name = "try"\n'
        f'[config]\ntasks = {json.dumps(tasks)}\nmodel = "{base.path}"\n'
        'dtype = "float32"\nepochs = 1\nbatch_size = 5\n'
        '[[runs]]\narm = "FROZEN"\nseeds = [0, 1]\n[[runs]]\narm = "NAIVE"\nseeds = [0]\n'
    )
    names = set(read_experiment(config).planned())

    def run(folder: str, *options: str) -> dict[str, Any]:
        code, out, err = crma(
            *("experiment", config, "--results", tmp_path / folder),
            *("--work", tmp_path / f"{folder}-work", "--json", *options),
        )
        assert code == 0, err
        records: dict[str, Any] = json.loads(out)
        return records

    here = run("here")
    assert set(run("there", "--ray", "--only", "*-seed1")) == {"FROZEN-seed1"}
    made = tmp_path / "there" / "try" / "FROZEN-seed1.json"
    before = made.stat().st_mtime_ns
    there = run("there", "--ray")
    assert set(there) == names
    assert made.stat().st_mtime_ns == before, "a record is made once"
    for name in names:
        losses = (there[name]["loss"], here[name]["loss"])
        for made_there, made_here in zip(*losses, strict=True):
            assert made_there == pytest.approx(made_here, abs=1e-5)
