"""The benchmark: metrics, parsed streams, the order of its measurements, and the rows it writes."""

import json
from typing import Any

import pytest
from bench.__main__ import Results, measure_rows, report_ratios, report_rows
from bench.engine import Engine
from bench.load import RawStream, parse_stream
from bench.metrics import RequestResult, compute_metrics, summarize
from bench.report import Report
from bench.workloads import CRMA_ALTERNATING, TASKS, Workload, speed_limit

LIMITS = {"read_gb_s": 20.0, "read_tok_s": 100.0, "gemm_tok_s": 1000.0, "prefill_tok_s": 1200.0}


def written_rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The rows on stdout since the last call."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_metrics_leave_out_failures_and_pool_the_gaps_between_tokens() -> None:
    succeeded = [RequestResult(0, [1, 2, 4], 3), RequestResult(2, [4, 5, 6], 3)]
    failed = RequestResult(0, [0.1], 1, error="HTTP 429")
    metrics = compute_metrics([*succeeded, failed], duration=8, prompt_tokens=10)
    assert metrics == pytest.approx(
        {
            "failed": 1,
            "output_tok_s": 0.75,
            "ttft_p50_s": 1.5,
            "ttft_p95_s": 1.95,
            "itl_p50_s": 1,
            "itl_p99_s": 1.97,
            "decode_tok_s": (2 / 3 + 1) / 2,
            "prefill_tok_s": 7.5,
        }
    )


def test_a_run_in_which_every_request_failed_has_no_figures() -> None:
    failed = RequestResult(0, [0.1], 1, error="HTTP 429")
    metrics = compute_metrics([failed], duration=8, prompt_tokens=10)
    assert metrics.pop("failed") == 1
    assert set(metrics.values()) == {None}


def test_a_summary_of_no_values_is_none() -> None:
    assert summarize([None]) is None


def recorded(events: list[dict[str, Any]]) -> RawStream:
    """A stream, sent at 0.5, of which event i arrives at second i, counted from 1."""
    lines = [
        (float(i), f"data: {json.dumps(event)}".encode()) for i, event in enumerate(events, start=1)
    ]
    return RawStream(0.5, [*lines, (9, b""), (9, b"data: [DONE]")])


@pytest.mark.parametrize(
    ("choices", "usage", "error"),
    [
        ([("a", None), ("", None), ("", "length")], 2, None),
        ([("a", None), ("", "length")], 1, "1 tokens of 2"),
        ([], 0, "0 tokens of 2"),
    ],
)
def test_a_stream_succeeds_only_with_all_of_its_tokens(
    choices: list[tuple[str, str | None]], usage: int, error: str | None
) -> None:
    events: list[dict[str, Any]] = [
        {"choices": [{"text": text, "finish_reason": reason}], "usage": None}
        for text, reason in choices
    ]
    events.append({"choices": [], "usage": {"completion_tokens": usage}})
    result = parse_stream(recorded(events), new_tokens=2)
    assert result.error == error
    assert result.num_tokens == usage
    token_times = [float(i) for i, (_, reason) in enumerate(choices, start=1) if reason is None]
    assert result.token_times == token_times


def test_an_error_event_fails_its_request() -> None:
    result = parse_stream(recorded([{"error": "no"}]), new_tokens=2)
    assert result.error == "no"


def test_alternating_requests_have_crma_once_on_and_once_off_for_each_task() -> None:
    states = [model.partition(":")[2] for model in CRMA_ALTERNATING]
    assert states == ["crma-off", "crma-on"] * 5
    assert set(CRMA_ALTERNATING) == {f"{task}:crma-{s}" for task in TASKS for s in ("on", "off")}


def test_engines_take_turns_and_the_first_round_is_a_short_warm_up() -> None:
    runs: list[tuple[str, int]] = []

    def run(workload: Workload, seed: str) -> tuple[list[RequestResult], float]:
        runs.append((seed, workload.num_requests))
        return [RequestResult(0, [1.0], 1)], 1.0

    engines = {
        "ours": Engine(run, frozenset({"base", "lora-0"})),
        "other": Engine(run, frozenset({"base"})),
    }
    rows = {
        "base": Workload(num_requests=4, concurrency=2),
        "lora": Workload(models=("lora-0:crma-off",), num_requests=4, concurrency=2),
    }
    results = measure_rows(engines, rows, repetitions=1)
    warm_up = [("base ours 0", 2), ("base other 0", 2), ("lora ours 0", 2)]
    measured = [("base ours 1", 4), ("base other 1", 4), ("lora ours 1", 4)]
    assert runs == warm_up + measured
    assert {key: len(repetitions) for key, repetitions in results.items()} == {
        ("base", "ours"): 1,
        ("base", "other"): 1,
        ("lora", "ours"): 1,
    }


def test_the_speed_limit_is_memory_at_low_concurrency_and_arithmetic_at_high() -> None:
    assert speed_limit(Workload(concurrency=2), LIMITS) == 200
    assert speed_limit(Workload(concurrency=16), LIMITS) == 1000
    assert speed_limit(Workload("prefill_tok_s", concurrency=1), LIMITS) == 1200


def test_a_row_has_medians_the_failures_of_all_repetitions_and_its_share_of_the_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = Report({"commit": "abc"})
    failures = (0.0, 1.0, 0.0)
    speeds = (9.0, 5.0, 6.0)
    repetitions = [
        {"failed": failed, "tok_s": speed} for failed, speed in zip(failures, speeds, strict=True)
    ]
    report.add("mixed", "server", "tok_s", repetitions, limit=12)
    assert written_rows(capsys) == [
        {
            "row": "mixed",
            "engine": "server",
            "measure": "tok_s",
            "repetitions": 3,
            "failed": 1,
            "tok_s": {"median": 6, "min": 5, "max": 9},
            "limit": 12,
            "commit": "abc",
            "share_of_limit": 0.5,
        }
    ]
    assert report.has_failures
    assert "mixed" in report.table()


def test_rows_state_settings_workload_and_share_of_the_best_limit_but_int8_has_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    disturbed = {name: value / 2 for name, value in LIMITS.items()}
    results: Results = {
        ("base", engine): [{"failed": 0, "output_tok_s": 500.0}]
        for engine in ("server", "int8", "peft")
    }
    report_rows(Report({}), {"base": Workload()}, results, [disturbed, LIMITS])
    limits, *rows = written_rows(capsys)
    assert limits["read_gb_s"] == {"median": 15, "min": 10, "max": 20}
    server, int8, peft = rows
    assert [row["settings"] for row in rows] == [{}, {"CRMA_QUANTIZATION": "int8"}, None]
    assert server["workload"]["measure"] == "output_tok_s"
    assert server["share_of_limit"] == peft["share_of_limit"] == 0.5
    assert "limit" not in int8


def test_ratios_are_taken_repetition_by_repetition(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"mixed": Workload(), "base": Workload()}
    results: Results = {
        ("mixed", "server"): [{"output_tok_s": 1.0}, {"output_tok_s": 4.0}],
        ("base", "server"): [{"output_tok_s": 2.0}, {"output_tok_s": 4.0}],
        ("base", "other"): [{"output_tok_s": 2.0}, {"output_tok_s": 4.0}],
    }
    engines = dict.fromkeys(
        ("server", "other"), Engine(lambda _workload, _seed: ([], 0.0), frozenset())
    )
    report_ratios(Report({}), rows, results, engines)
    (row,) = written_rows(capsys)
    assert (row["row"], row["engine"]) == ("mixed / base", "server")
    assert row["ratio"] == {"median": 0.75, "min": 0.5, "max": 1}
