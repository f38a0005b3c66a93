"""A replica whose engine is vLLM.

Needs Ray and vLLM in one environment, which `make vllm` makes.
"""

import importlib.util
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import shipped
from paths import STORE
from ray_cluster import START_SECONDS, Cluster, descendants, name_of, needs_ray, running

pytestmark = [
    pytest.mark.vllm,
    needs_ray,
    pytest.mark.filterwarnings("default"),  # what vLLM imports warns, and that is none of our code
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="make e2e-vllm runs this"),
]
SETTINGS = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 512}
ON_VLLM = {"engine": "vllm", "max_loras": 4, "max_num_batched_tokens": 256, "num_threads": 1}
TOLERANCE = 1e-3  # as in test_vllm.py


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("vllm")
    own = {"store": str(STORE), "admin_key": "admin", "evaluations": str(folder / "evaluations")}
    with running(folder, {**SETTINGS, **ON_VLLM, **own}, replicas=1) as served:
        yield served


def question(task: str | None, crma: bool) -> dict[str, Any]:
    return {
        **{"prompt": "What lowers a fever?", "raw": True, "ignore_eos": True, "logprobs": True},
        **{"task": task, "crma": crma, "max_tokens": 8},
    }


async def test_base_task_and_crma_answer_as_on_the_native_engine(cluster: Cluster) -> None:
    asked = [question(task, crma) for task in (None, "medical") for crma in (False, True)]
    found = [cluster.generate(**body) for body in asked]
    async with shipped.server(**SETTINGS, kernel="off") as alone:
        wanted = [(await alone.post("/generate", json=body)).json() for body in asked]
    for answer, other in zip(found, wanted, strict=True):
        assert answer["text"] == other["text"]
        assert answer["logprobs"] == pytest.approx(other["logprobs"], abs=TOLERANCE)
    assert len({answer["text"] for answer in found}) > 1


def test_the_processes_of_a_replica_that_is_killed_end_and_another_takes_its_place(
    cluster: Cluster,
) -> None:
    """Those that stay would keep the memory that the next one needs."""
    (replica,) = cluster.engines()
    old = set(descendants(replica))
    assert any(name_of(process).startswith("VLLM::") for process in old)
    os.kill(replica, signal.SIGKILL)
    until = time.monotonic() + START_SECONDS
    while any(map(name_of, old)):
        assert time.monotonic() < until, [name_of(process) for process in old]
    cluster.wait_until("replicas", 1.0)
    assert cluster.generate(**question("medical", True))["text"]
    assert not old & set(cluster.engines())
