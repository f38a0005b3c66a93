"""server.service.metrics: bounded labels, and series that exist before anything happens."""

from prometheus_client import CollectorRegistry

from server.engine.request import FinishReason, Request, Timings
from server.service.metrics import Metrics
from server.service.outcome import Outcome

FAILED = "crma_request_success_total"


def metrics(**options: int) -> Metrics:
    return Metrics(CollectorRegistry(), **options)


def failures(made: Metrics, adapter: str, crma: str = "on") -> float | None:
    labels = {"finished_reason": "error", "adapter": adapter, "crma": crma}
    return made.registry.get_sample_value(FAILED, labels)


def ended(**changes: object) -> Outcome:
    """A request of two answers that has finished."""
    values = {
        "request": Request("gen-1", (1, 2, 3)),
        "task": None,
        "labels": ("base", "off"),
        "reasons": (FinishReason.STOP, FinishReason.LENGTH),
        "output_tokens": (4, 30),
        "cached_tokens": 0,
        "timings": Timings(0.5, 2.0, 6.0),
        "error": None,
        "own_deadline": False,
    }
    return Outcome(**{**values, **changes})  # type: ignore[arg-type]


def test_the_series_of_a_first_failure_exist_before_it() -> None:
    """`increase()` sees no change in a series that begins at 1: no alert saw the first error."""
    made = metrics()
    assert failures(made, "base") == failures(made, "_other", "off") == 0
    made.serve_adapters(["legal"])
    assert failures(made, "legal") == 0
    for name, labels in (
        ("crma_errors_total", {"code": "generation_failed"}),
        ("crma_errors_total", {"code": "queue_full"}),
        ("crma_deadlines_missed_total", {"set_by": "server"}),
    ):
        assert made.registry.get_sample_value(name, labels) == 0


def test_names_of_the_store_have_labels_only_while_all_fit() -> None:
    made = metrics(max_adapter_labels=2)
    made.serve_adapters(["a", "b"])
    assert [made.known_label(name) for name in "abc"] == ["a", "b", "_other"]
    assert made.adapter_label("b") == "b"
    made.serve_adapters(["a", "b", "c"])
    assert [made.known_label(name) for name in "abc"] == ["_other", "b", "_other"]
    assert failures(made, "a") is None
    assert failures(made, "b") == 0
    assert made.adapter_label("c") == "c"
    assert made.adapter_label("a") == "_other"


def test_names_that_come_and_go_leave_no_series() -> None:
    made = metrics(max_adapter_labels=2)
    for number in range(100):
        made.serve_adapters([f"task{number}"])
    (family,) = made.success.collect()
    adapters = {sample.labels["adapter"] for sample in family.samples}
    assert adapters == {"base", "_other", "task99"}


def test_lengths_and_phases_are_observed_once_for_a_request_and_each_answer() -> None:
    made = metrics()
    made.count_request(ended())
    value = made.registry.get_sample_value
    off = {"crma": "off"}
    assert value("crma_request_prefill_time_seconds_sum", off) == 1.5
    assert value("crma_request_decode_time_seconds_sum", off) == 4.0
    assert value("crma_request_prompt_tokens_sum", off) == 3
    assert value("crma_request_generation_tokens_count", off) == 2
    assert value("crma_request_generation_tokens_sum", off) == 34
    assert value("crma_request_max_num_generation_tokens_sum", off) == 30


def test_the_times_of_background_work_are_not_those_of_the_server() -> None:
    """A client could set off an alert with an ablation, which waits for everything else."""
    made = metrics()
    made.count_request(ended(request=Request("abl-1", (1,), interactive=False)))
    both = {"adapter": "base", "crma": "off"}
    assert made.registry.get_sample_value("crma_request_queue_time_seconds_count", both) is None
    assert made.registry.get_sample_value(FAILED, {"finished_reason": "stop", **both}) == 1


def test_a_deadline_counts_for_who_had_set_it() -> None:
    made = metrics()
    late = ended(error="deadline_exceeded", timings=None, reasons=(FinishReason.ABORT,))
    made.count_request(late)
    made.count_request(ended(error="deadline_exceeded", timings=None, own_deadline=True))
    made.count_request(ended(error="aborted", timings=None))
    for who in ("client", "server"):
        labels = {"set_by": who}
        assert made.registry.get_sample_value("crma_deadlines_missed_total", labels) == 1


def test_drift_of_names_without_a_label_is_the_worst_of_them() -> None:
    made = metrics(max_adapter_labels=1)
    made.adapter_label("a")
    made.set_drift({"a": 0.01, "b": -0.02, "c": 0.03})
    value = made.registry.get_sample_value
    assert value("crma_promotion_drift_ratio", {"adapter": "a"}) == 0.01
    assert value("crma_promotion_drift_ratio", {"adapter": "_other"}) == 0.03
    made.set_drift({})
    assert value("crma_promotion_drift_ratio", {"adapter": "a"}) is None
