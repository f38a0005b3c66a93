"""server.service.vllm_metrics: what vLLM's dashboards and routers query, beside our own names."""

import re

import pytest
import tiny
from api import BASE, Serve
from prometheus_client.parser import text_string_to_metric_families

from crma.store.adapter_store import AdapterStore

# What the Grafana dashboard of vLLM queries
# (examples/observability/prometheus_grafana/grafana.json, commit 4b5c627).
WHOLE = ("bucket", "sum", "count")
DASHBOARD = {
    "e2e_request_latency_seconds": WHOLE,
    "inter_token_latency_seconds": WHOLE,
    "time_to_first_token_seconds": WHOLE,
    "request_queue_time_seconds": ("sum",),
    "request_prefill_time_seconds": ("sum",),
    "request_decode_time_seconds": ("sum",),
    "request_prompt_tokens": ("bucket",),
    "request_generation_tokens": ("bucket",),
    "request_max_num_generation_tokens": ("sum",),
    "prompt_tokens": ("total",),
    "generation_tokens": ("total",),
    "request_success": ("total",),
}
GAUGES = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The value of each sample by name and labels."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_every_series_of_vllms_dashboard_has_the_models_name(serve: Serve) -> None:
    served = await serve(metrics_compat=True)
    await served.generate(task="medical", crma=True)
    await served.generate(task="legal")
    found = samples(await served.metrics())
    names = {name for name, labels in found if ("model_name", "tiny") in labels}
    queried = {f"vllm:{name}_{end}" for name, ends in DASHBOARD.items() for end in ends}
    assert names >= queried | GAUGES
    model = (("engine", "0"), ("model_name", "tiny"))
    assert found["vllm:time_to_first_token_seconds_count", model] == 2
    assert found["vllm:request_prefill_time_seconds_sum", model] == 0.2
    reason = (("engine", "0"), ("finished_reason", "stop"), ("model_name", "tiny"))
    assert found["vllm:request_success_total", reason] == 2


async def test_a_bucket_is_the_sum_of_ours_and_there_is_one_before_any_request(
    serve: Serve,
) -> None:
    served = await serve(metrics_compat=True)
    empty = samples(await served.metrics())
    labels = (("engine", "0"), ("le", "0.25"), ("model_name", "tiny"))
    assert empty["vllm:time_to_first_token_seconds_bucket", labels] == 0
    for task in ("medical", "legal"):
        await served.generate(task=task)
    found = samples(await served.metrics())
    ours = [
        value
        for (name, with_labels), value in found.items()
        if name == "crma_time_to_first_token_seconds_bucket" and ("le", "0.25") in with_labels
    ]
    assert found["vllm:time_to_first_token_seconds_bucket", labels] == sum(ours) == 2


async def test_vllms_names_are_off_by_default_but_for_the_one_that_routers_need(
    serve: Serve,
) -> None:
    served = await serve()
    assert set(re.findall(r"^vllm:\w+", await served.metrics(), re.MULTILINE)) == {
        "vllm:lora_requests_info"
    }


# Routers by adapter ---------------------------------------------------------------------------


def labels_of(text: str, name: str) -> dict[str, str]:
    """The labels of the only sample of a metric."""
    (found,) = [dict(labels) for each, labels in samples(text) if each == name]
    return found


async def test_an_endpoint_picker_finds_all_that_it_reads(serve: Serve) -> None:
    """Those of llm-d and of the Gateway API Inference Extension, which read whole numbers."""
    served = await serve(metrics_compat=True)
    text = await served.metrics()
    assert {name for name, _ in samples(text)} >= GAUGES
    cache = labels_of(text, "vllm:cache_config_info")
    assert cache == {"engine": "0", "block_size": "16", "num_gpu_blocks": "64"}
    assert labels_of(text, "vllm:lora_requests_info") == {
        "max_lora": "32",
        "running_lora_adapters": "",
        "waiting_lora_adapters": "",
    }


async def test_on_vllm_as_many_adapters_run_as_there_are_slots(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was how many this process keeps, of which a router would send too many at once."""
    monkeypatch.setenv("CRMA_ENGINE", "vllm")
    served = await serve(max_loras=3)
    info = labels_of(await served.metrics(), "vllm:lora_requests_info")
    assert info["max_lora"] == "3"


async def test_an_adapter_in_memory_counts_as_running_by_the_name_that_clients_send(
    serve: Serve, own: AdapterStore
) -> None:
    """Only running requests counted, so that an idle replica with the adapter got none; and a
    version that did not serve was listed as the task, whose requests then waited for a load."""
    old = own.task("legal").digest
    new = tiny.publish(own, BASE, "legal", 7).digest
    served = await serve(store=own.root)

    async def running() -> str:
        text = await served.metrics()
        return labels_of(text, "vllm:lora_requests_info")["running_lora_adapters"]

    served.engine.pool.load(own.task("medical").digest)
    served.engine.pool.load(own.backbone().digest)
    assert await running() == "medical"
    served.engine.pool.load(old)
    assert await running() == "legal@v1,medical"
    served.engine.pool.load(new)
    assert await running() == "legal,legal@v1,medical"
    own.roll_back("tasks/legal")
    await served.app.state.frontend.registry.refresh()
    assert await running() == "legal,legal@v2,medical"


async def test_a_request_with_a_suffix_runs_the_adapter_of_its_name(serve: Serve) -> None:
    served = await serve()
    body = {"model": "medical:crma-off", "prompt": "Hi"}
    assert (await served.client.post("/v1/completions", json=body)).status_code == 200
    info = labels_of(await served.metrics(), "vllm:lora_requests_info")
    assert info["running_lora_adapters"] == "medical"
