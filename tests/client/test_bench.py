"""The benchmark: metrics, parsed streams, the order of its measurements, and the rows it writes."""

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from bench.__main__ import SERVERS, measure_rows, num_adapters, report_ratios, report_rows
from bench.engine import Engine
from bench.goals import Goal, goals
from bench.load import RawStream, parse_stream
from bench.metrics import RequestResult, Results, compute_metrics, ratios, summarize
from bench.options import parse_options
from bench.report import Report
from bench.workloads import (
    ALL_ROWS,
    CRMA_ALTERNATING,
    LORAS,
    MANY_LORAS,
    ROWS,
    TASKS,
    Workload,
    chosen_rows,
    speed_limit,
)

LOAD = {"median": 0.5, "min": 0.5, "max": 0.5}
LIMITS = {"read_gb_s": 20.0, "read_tok_s": 100.0, "gemm_tok_s": 1000.0, "prefill_tok_s": 1200.0}


def answering(**details: Any) -> Engine:
    """An engine that has answered nothing yet."""
    return Engine(lambda _workload, _seed: ([], 0.0), frozenset({"base", *LORAS}), **details)


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
            "ttft_p99_s": 1.99,
            "itl_p50_s": 1,
            "itl_p95_s": 1.85,
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
    report.add("mixed", "server", "tok_s", repetitions, limit=12, load_average=LOAD)
    assert written_rows(capsys) == [
        {
            "row": "mixed",
            "engine": "server",
            "measure": "tok_s",
            "repetitions": 3,
            "load_average": LOAD,
            "failed": 1,
            "tok_s": {"median": 6, "min": 5, "max": 9},
            "limit": 12,
            "commit": "abc",
            "share_of_limit": 0.5,
        }
    ]
    assert report.has_failures
    assert "mixed" in report.table()


def test_rows_state_how_they_were_computed_and_their_share_of_the_best_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    disturbed = {name: value / 2 for name, value in LIMITS.items()}
    engines = {
        "server": answering(kernel="avx2", dtype="float32"),
        "int8": answering(kernel="avx2", dtype="float32+int8"),
        "peft": answering(),
    }
    results: Results = {}
    for engine in engines:
        results["base", engine] = [{"failed": 0, "output_tok_s": 500.0}]
        results["single", engine] = [{"failed": 0, "decode_tok_s": 50.0}]
        results["poisson", engine] = [{"failed": 0, "ttft_p95_s": 2.0}]
    report_rows(Report({}), ALL_ROWS, results, engines, [disturbed, LIMITS])
    limits, *rows = written_rows(capsys)
    assert limits["read_gb_s"] == {"median": 15, "min": 10, "max": 20}
    assert [row["settings"] for row in rows[::3]] == [SERVERS["server"], SERVERS["int8"], None]
    assert [row["kernel"] for row in rows[::3]] == ["avx2", "avx2", None]
    assert rows[3]["dtype"] == "float32+int8"
    assert rows[0]["workload"]["measure"] == "output_tok_s"
    assert all("load_average" in row for row in (limits, *rows))
    shares = {(row["row"], row["engine"]): row.get("share_of_limit") for row in rows}
    assert shares == {
        ("base", "server"): 0.5,
        ("base", "int8"): None,  # no rate of products of 8 bits is measured
        ("base", "peft"): 0.5,
        ("single", "server"): 0.5,
        ("single", "int8"): 0.25,  # it reads half as much
        ("single", "peft"): 0.5,
        ("poisson", "server"): None,
        ("poisson", "int8"): None,
        ("poisson", "peft"): None,
    }


def test_ratios_are_taken_repetition_by_repetition(capsys: pytest.CaptureFixture[str]) -> None:
    results: Results = {
        ("mixed", "server"): [{"output_tok_s": 1.0}, {"output_tok_s": 4.0}],
        ("base", "server"): [{"output_tok_s": 2.0}, {"output_tok_s": 4.0}],
        ("base", "other"): [{"output_tok_s": 2.0}, {"output_tok_s": 4.0}],
    }
    engines = dict.fromkeys(("server", "other"), answering())
    report_ratios(Report({}), results, engines)
    (row,) = written_rows(capsys)
    assert (row["row"], row["engine"]) == ("mixed / base", "server")
    assert row["ratio"] == {"median": 0.75, "min": 0.5, "max": 1}


def test_a_row_in_random_order_names_every_model_once_a_turn() -> None:
    churn = ALL_ROWS["churn-64"]
    order = [request.model for request in churn.requests("seed")]
    assert sorted(order) == sorted(MANY_LORAS)
    assert order != list(MANY_LORAS)
    assert order == [request.model for request in churn.requests("seed")]
    assert order != [request.model for request in churn.requests("another")]
    few = [request.model for request in ALL_ROWS["churn-8"].requests("seed")]
    assert all(sorted(few[i : i + 8]) == list(LORAS) for i in range(0, 64, 8))
    assert few[:8] != few[8:16]


def test_the_warm_up_of_a_row_names_every_model() -> None:
    churn = ALL_ROWS["churn-64"].short()
    assert churn.base_models() == {request.model for request in churn.requests("seed")}


def test_lengths_are_spread_by_their_logarithm_and_follow_the_seed() -> None:
    row = Workload(num_requests=2000, prompt_tokens=64, new_tokens=32, spread=4)
    requests = row.requests("seed")
    assert requests == row.requests("seed")
    for typical, lengths in (
        (64, sorted(len(request.prompt) for request in requests)),
        (32, sorted(request.new_tokens for request in requests)),
    ):
        assert typical / 4 <= lengths[0] < typical / 3
        assert typical * 3 < lengths[-1] <= typical * 4
        assert lengths[len(lengths) // 2] == pytest.approx(typical, rel=0.1)
        # A quarter of the requests on each side is beyond twice or half the typical length.
        assert lengths[len(lengths) * 3 // 4] == pytest.approx(typical * 2, rel=0.1)


def test_requests_arrive_at_random_at_the_stated_rate() -> None:
    row = Workload(num_requests=2000, arrival_share=0.5, arrivals_per_s=4.0)
    times = row.arrival_times("seed")
    assert times == row.arrival_times("seed") != row.arrival_times("another")
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000 / 4, rel=0.1)
    gaps = sorted(later - earlier for earlier, later in pairwise(times))
    assert gaps[len(gaps) // 2] == pytest.approx(math.log(2) / 4, rel=0.1)  # as Poisson's


def test_the_rate_of_arrivals_is_a_share_of_what_the_engine_has_just_reached() -> None:
    rates: list[float | None] = []

    def run(workload: Workload, seed: str) -> tuple[list[RequestResult], float]:
        rates.append(workload.arrivals_per_s)
        tokens = 8 if workload.new_tokens == 8 else 640
        return [RequestResult(0, [1.0, 2.0], tokens)], 2.0

    engines = {"server": Engine(run, frozenset(LORAS))}
    rows = {"mixed": ROWS["mixed"], "poisson": ROWS["poisson"]}
    results = measure_rows(engines, rows, repetitions=1)
    # 8 tokens in 2 s of which a request has 8; then 640 of which it has 64.
    assert rates == [None, pytest.approx(0.7 / 2), None, pytest.approx(0.7 * 5)]
    assert results["poisson", "server"][0]["arrivals_per_s"] == pytest.approx(0.7 * 5)


def test_no_request_arrives_at_a_share_of_nothing() -> None:
    def run(workload: Workload, seed: str) -> tuple[list[RequestResult], float]:
        return [RequestResult(0, error="HTTP 500")], 1.0

    rows = {"mixed": ROWS["mixed"], "poisson": ROWS["poisson"]}
    results = measure_rows({"server": Engine(run, frozenset(LORAS))}, rows, repetitions=1)
    assert set(results) == {("mixed", "server")}


def test_static_batches_have_no_rows_of_random_lengths_or_arrivals() -> None:
    peer = answering(is_static=True)
    served = {name for name, row in ALL_ROWS.items() if peer.can_serve(row)}
    assert {"mixed", "base", "long", "churn-8"} <= served
    assert served.isdisjoint({"random-length", "poisson"})


def test_rows_are_chosen_by_name_with_the_row_that_arrivals_need() -> None:
    (rows,) = chosen_rows(frozenset({"poisson"}))
    assert list(rows) == ["mixed", "poisson"]
    crma, churn = chosen_rows(frozenset({"churn-8", "crma-on"}))
    assert (list(crma), list(churn)) == (["crma-on"], ["churn-8"])
    options = parse_options(["--rows", "start,base", "--engines", "server"], "", ("server", "peft"))
    assert options.rows == {"start", "base"}
    assert options.engines == {"server"}
    assert options.repetitions == 3


@pytest.mark.parametrize("arguments", [["--rows", "base,fast"], ["--engines", "fast"]])
def test_an_unknown_row_or_engine_is_refused_with_those_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments, "", ("server", "peft"))
    message = capsys.readouterr().err
    assert "there is no fast" in message
    assert "server" in message or "churn-64" in message


def test_only_rows_of_many_adapters_need_them() -> None:
    assert num_adapters(chosen_rows(frozenset({"mixed", "churn-8"}))) == 8
    assert num_adapters(chosen_rows(frozenset({"mixed", "churn-64"}))) == 64


def test_a_goal_is_a_share_of_the_limit_or_a_quotient_of_the_best_compared() -> None:
    figures = {
        ("single", "server"): [60.0, 80.0],
        ("single", "int8"): [100.0],
        ("mixed", "server"): [200.0, 240.0],
        ("mixed", "slow"): [20.0, 20.0],
        ("mixed", "fast"): [50.0, 80.0],
        ("single", "llama.cpp"): [30.0, 30.0],
        ("single", "llama.cpp-bf16"): [40.0, 40.0],
        ("prefill", "server"): [90.0],
        ("prefill", "llama.cpp"): [30.0],
        ("prefill", "llama.cpp-bf16"): [10.0],
    }
    by_label = {goal.label: goal for goal in goals(["server", "int8", "slow", "fast"])}

    def found(label: str) -> list[float | None]:
        return by_label[label].found(figures, LIMITS)

    assert found("one stream: share of read bandwidth") == [0.6, 0.8]
    assert found("one stream, int8: share of read bandwidth") == [0.5]
    assert found("8 adapters mixed / best peer") == [4.0, 3.0]
    assert found("8 adapters mixed / none") == []
    assert found("one stream / llama.cpp, 16 bits a weight") == [1.5, 2.0]
    assert found("512-token prompt / llama.cpp, 16 bits a weight") == [3.0]
    assert found("one stream / llama.cpp, 8 bits a weight") == []


def test_each_goal_is_listed_with_what_was_found(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report({"commit": "abc"})
    goal = Goal("fast", 0.5, 0.9, ("base", "server"))
    for found in ([], [0.4, 0.3, None], [0.5], [0.8, 1.0]):
        report.add_goal(goal, found)
    rows = written_rows(capsys)
    assert [row["reached"] for row in rows] == [None, "no", "must", "aim"]
    assert rows[1]["found"] == {"median": 0.35, "min": 0.3, "max": 0.4}
    assert rows[0]["goal"] == "fast"
    assert rows[0]["commit"] == "abc"
    _, *lines = report.goals_table().splitlines()
    assert [line.split()[1:] for line in lines] == [
        ["0.5", "0.9", "-", "-,", "-"],
        ["0.5", "0.9", "0.35", "no,", "no"],
        ["0.5", "0.9", "0.5", "yes,", "no"],
        ["0.5", "0.9", "0.9", "yes,", "yes"],
    ]


def test_ratios_of_missing_figures_are_missing() -> None:
    assert ratios([1.0, None, 3.0, 4.0], [2.0, 1.0, None, 0.0]) == [0.5, None, None, None]
