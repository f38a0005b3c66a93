"""A server on vLLM, as its users start it: the answers of our own engine, other people's clients,
and when it is ready."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import httpx
import pytest
from lm_eval_scores import MODELS, check_scores
from server_process import running_script, running_server

from crma.core.selection import Variant
from crma.evaluation.offline import Served
from server.service.frontend import COLD

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM, lm-eval and its datasets give many
    pytest.mark.skipif(find_spec("vllm") is None, reason="make e2e-vllm runs this"),
]
VARIANTS = ("base", "task", "crma", "task+crma")
TASKS = ("medical", "legal", "finance", "code", "science")
NEAR_TIE = 1e-3  # of log-probabilities in float32: what rounding may turn round
SECONDS = 600.0  # for an answer: this engine is slow on CPUs
CLIENTS = Path(__file__).parent / "openai_clients"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server(CRMA_ENGINE="vllm", CRMA_REQUEST_TIMEOUT_S=str(SECONDS)) as address:
        yield address


@pytest.fixture(scope="module")
def native() -> Iterator[str]:
    with running_server() as address:
        yield address


# The answers of our own engine ----------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_an_ablation_has_the_answers_of_our_own_engine(
    task: str, address: str, native: str, record_property: Callable[[str, object], None]
) -> None:
    """All that differs are answers in which two tokens were as likely as each other."""
    ours, theirs = ablation(native, task), ablation(address, task)
    assert ours["provenance"] == theirs["provenance"]
    num_answers = 0
    ties = []
    for one, other in zip(ours["items"], theirs["items"], strict=True):
        for variant in VARIANTS:
            num_answers += 1
            texts = one["outputs"][variant]["text"], other["outputs"][variant]["text"]
            if texts[0] != texts[1]:
                ties.append((one["id"], variant, margin(native, one, task, variant, texts[1])))
    record_property("answers", num_answers)
    record_property("near_ties", ties)
    assert num_answers == 20 * len(VARIANTS)
    assert [tie for tie in ties if tie[2] > NEAR_TIE] == []


def ablation(address: str, task: str) -> dict[str, Any]:
    """The public questions of a task in all variants."""
    body = {"question_set": "public", "tasks": [task], "variants": VARIANTS}
    answer = httpx.post(f"{address}/ablation", json=body, timeout=SECONDS)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    assert all(each["failed"] == each["timed_out"] == 0 for each in found["variants"].values())
    return found


def margin(address: str, item: dict[str, Any], task: str, variant: str, text: str) -> float:
    """By how much the likeliest token leads where an answer leaves `text`, in log-probability."""
    (question,) = [
        each for each in questions(address) if (each["id"], each["task"]) == (item["id"], task)
    ]
    body = {
        "prompt": question["question"],
        "format_of": task,
        "crma": "crma" in variant,
        "logprobs": True,
        "top_logprobs": 2,
        **({"task": task} if "task" in variant else {}),
    }
    answer = httpx.post(f"{address}/generate", json=body, timeout=SECONDS).json()
    written = ""
    for first, second in answer["top_logprobs"]:
        written += first["token"]
        if not text.startswith(written):
            return float(first["logprob"] - second["logprob"])
    raise AssertionError(f"{answer['text']!r} does not leave {text!r}")


def questions(address: str) -> list[dict[str, Any]]:
    lines = httpx.get(f"{address}/question_sets/public", timeout=SECONDS).text.splitlines()
    return [json.loads(line) for line in lines]


# Other people's clients -----------------------------------------------------------------------


@pytest.mark.parametrize("model", ["base", "medical"])
def test_the_openai_sdk_works_unchanged(model: str, address: str) -> None:
    command = [sys.executable, "openai_sdk.py", address, model]
    run = subprocess.run(command, cwd=CLIENTS, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(("variant", "model"), MODELS)
def test_lm_eval_scores_the_server_as_it_scores_the_weights(
    variant: Variant,
    model: str,
    address: str,
    served: Served,
    lm_eval_tasks: Path,
    record_property: Callable[[str, object], None],
) -> None:
    record_property(variant, check_scores(lm_eval_tasks, address, variant, model, served))


# When it is ready -----------------------------------------------------------------------------

START = """
import sys
from dataclasses import replace
from server import __main__ as server
from server.engine.vllm import launch

start = launch.start_engine
guards = sys.argv[1] == "guarded"
launch.start_engine = lambda base, config: start(base, replace(config, guards_base_rows=guards))
sys.exit(server.main())
"""
SETTINGS = {
    "CRMA_ENGINE": "vllm",
    "CRMA_KERNEL": "",  # which this engine does not have
    "CRMA_MAX_MODEL_LEN": "400",
    "CRMA_MAX_LORAS": "4",
    "CRMA_DRAIN_GRACE_S": "0",
}
LOADING = "loading"
VERIFYING = "the adapter store is not verified yet"


@pytest.mark.parametrize("guard", ["guarded", "unguarded"])
def test_it_is_ready_once_its_self_check_has_passed_and_ends_if_it_does_not(
    guard: str, tmp_path: Path
) -> None:
    settings = {"family": "llama_parallel", **SETTINGS}
    with (
        running_script(START, guard, tmp_path=tmp_path, **settings) as (server, address),
        ThreadPoolExecutor(1) as threads,
    ):
        assert server.stderr is not None
        shown = threads.submit(server.stderr.read)
        readiness = [each for each, _ in groupby(until_ready_or_gone(address, server))]
        reasons = [reason for _, reason in readiness if reason != VERIFYING]
        if guard == "guarded":
            text = httpx.get(f"{address}/metrics").text
            server.terminate()
        assert server.wait(timeout=120) == (0 if guard == "guarded" else 1)
    assert reasons[:2] == [LOADING, COLD]
    if guard == "guarded":
        assert readiness[-1] == (200, None)
        assert 'vllm:lora_requests_info{max_lora="4"' in text
    else:
        assert all(status == 503 for status, _ in readiness)
        assert "base beside other requests differs from base alone" in shown.result()


def until_ready_or_gone(
    address: str, server: subprocess.Popen[str]
) -> Iterator[tuple[int, str | None]]:
    """Statuses and reasons of /readyz, from the first that the server answers."""
    with httpx.Client(base_url=address, timeout=SECONDS) as client:
        while server.poll() is None:
            time.sleep(0.2)
            with suppress(httpx.TransportError):  # not yet, or no more
                answer = client.get("/readyz")
                yield answer.status_code, answer.json()["reason"]
                if answer.status_code == 200:
                    return
