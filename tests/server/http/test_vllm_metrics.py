"""server.service.vllm_metrics: what vLLM's dashboards and routers query, beside our own names."""

import re

from api import Serve
from prometheus_client.parser import text_string_to_metric_families

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
