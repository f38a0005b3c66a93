"""The benchmark's arithmetic on times that are known, and the shape of its rows."""

import json

import pytest
from bench.__main__ import row
from bench.latency import Answer, measures, spread
from bench.load import read


def test_figures_are_of_what_succeeded_and_gaps_are_pooled() -> None:
    answers = [
        Answer(0, [1, 2, 4], 3),
        Answer(2, [4, 5, 6], 3),
        Answer(0, [0.1], 1, error="HTTP 429"),
    ]
    found = measures(answers, wall=8, prompt_tokens=10)
    expected = {
        "failed": 1,
        "output_tok_s": 0.75,
        "ttft_p50_s": 1.5,
        "ttft_p95_s": 1.95,
        "itl_p50_s": 1,
    }
    expected |= {"itl_p99_s": 1.97, "decode_tok_s": (2 / 3 + 1) / 2, "prefill_tok_s": 7.5}
    assert found == pytest.approx(expected)
    assert set(measures(answers[2:], 8, 10).values()) == {1, None}


@pytest.mark.parametrize(
    ("choices", "usage", "error"),
    [
        ([("a", None), ("", None), ("", "length")], 2, None),
        ([("a", None), ("", "length")], 1, "1 tokens of 2"),
        ([], 0, "0 tokens of 2"),
    ],
)
def test_a_stream_is_an_answer_if_it_has_all_its_tokens(
    choices: list, usage: int, error: str | None
) -> None:
    events = [
        {"choices": [{"text": text, "finish_reason": reason}], "usage": None}
        for text, reason in choices
    ]
    events.append({"choices": [], "usage": {"completion_tokens": usage}})
    lines = [
        (float(i), f"data: {json.dumps(event)}".encode()) for i, event in enumerate(events, start=1)
    ]
    answer = read(0.5, [*lines, (9, b""), (9, b"data: [DONE]")], None, 2)
    assert (answer.error, answer.num_tokens) == (error, usage)
    assert answer.times == [
        float(i) for i, (_, reason) in enumerate(choices, start=1) if reason is None
    ]
    assert read(0.5, [(1, b'data: {"error": "no"}')], None, 2).error == "no"


def test_a_row_is_a_line_of_json_with_medians_failures_and_its_share(
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [{"failed": float(i == 1), "tok_s": speed} for i, speed in enumerate((9.0, 5.0, 6.0))]
    row("mixed", "server", "tok_s", runs, limit=12, commit="abc")
    found = json.loads(capsys.readouterr().out)
    assert found["tok_s"] == {"median": 6, "min": 5, "max": 9}
    assert (found["failed"], found["share_of_limit"], found["repetitions"], found["commit"]) == (
        1,
        0.5,
        3,
        "abc",
    )
    assert spread([None]) is None
