"""server.http.log: one line a request, with what operators need, that no client can forge."""

import json
import logging
import re
from typing import Any

import pytest
from api import Serve, Served
from scripted_engine import ScriptedEngine

from server.engine.errors import QueueFull
from server.engine.request import FinishReason
from server.http.log import Format

FORGED = "2026-11-27 00:00:00,000 INFO answered status=200"


class Lines:
    """The lines of the access log, as JSON."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        self._caplog = caplog

    def last(self) -> dict[str, Any]:
        records = [each for each in self._caplog.records if each.name == "server.access"]
        return json.loads(Format("json").format(records[-1]))


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    return Lines(caplog)


async def test_the_line_has_the_adapters_the_tokens_and_the_times(
    served: Served, lines: Lines
) -> None:
    answer = (await served.generate(task="medical", crma=True)).json()
    line = lines.last()
    selection = served.engine.requests[-1].selection
    assert line["task"] == "medical"
    assert line["task_digest"] == selection.task_digest
    assert line["crma"] is True
    assert line["crma_digest"] == selection.crma_digest
    assert line["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert (line["output_tokens"], line["cached_tokens"]) == (2, 1)
    assert (line["queue_s"], line["prefill_s"], line["decode_s"]) == (0.1, 0.1, 0.1)
    assert (line["total_s"], line["finish_reason"], line["status"]) == (0.3, "stop", 200)
    assert "key" not in line  # nobody was told apart


async def test_a_stream_and_a_list_of_prompts_are_one_line_each(
    served: Served, lines: Lines
) -> None:
    await served.generate(stream=True)
    assert (lines.last()["output_tokens"], lines.last()["finish_reason"]) == (2, "stop")
    body = {"model": "medical", "prompt": ["Hi", "Hello"], "n": 2}
    await served.client.post("/v1/completions", json=body)
    assert (lines.last()["output_tokens"], lines.last()["cached_tokens"]) == (8, 2)


async def test_the_name_of_the_key_is_in_the_line_and_the_key_is_not(
    serve: Serve, lines: Lines
) -> None:
    served = await serve(api_keys="sk-secret")
    await served.client.post(
        "/generate", json={"prompt": "Hi"}, headers={"Authorization": "Bearer sk-secret"}
    )
    line = lines.last()
    assert line["status"] == 200
    assert line["key"].startswith("env-")
    assert "secret" not in str(line)


async def test_a_failure_has_its_code_and_what_had_come(serve: Serve, lines: Lines) -> None:
    engine = ScriptedEngine()
    served = await serve(engine=engine)
    engine.ending = (FinishReason.ABORT, "deadline")
    await served.generate()
    line = lines.last()
    assert (line["status"], line["error"]) == (504, "deadline_exceeded")
    assert (line["output_tokens"], line["finish_reason"]) == (1, "abort")
    assert "total_s" not in line
    await served.generate(stream=True)
    assert (lines.last()["status"], lines.last()["error"]) == (200, "deadline_exceeded")
    engine.refusal = QueueFull(1, 1.0)
    await served.generate()
    assert (lines.last()["status"], lines.last()["error"]) == (429, "queue_full")
    assert "finish_reason" not in lines.last()  # it did not run
    await served.client.get("/nowhere")
    assert lines.last()["error"] == "no_route"
    text = await served.metrics()
    for code, count in (("deadline_exceeded", 2), ("queue_full", 1), ("no_route", 1)):
        assert f'crma_errors_total{{code="{code}"}} {count}.0' in text


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_client_can_begin_no_line(form: Any) -> None:
    """The message of an error holds what a client sent, and a line break began a forged line."""
    broken = f"\r\n{FORGED}\u2028{FORGED}\x1b[2K\x85{FORGED}"
    try:
        raise ValueError(f"inside: {broken}")
    except ValueError as error:
        info = (ValueError, error, error.__traceback__)
    record = logging.LogRecord("server", logging.ERROR, "f", 1, "%s", (f"bad {broken}",), info)
    record.fields = {"task": broken}
    text = Format(form).format(record)
    assert not any(line.startswith("2026-11-27 00") for line in text.splitlines())
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", text)
    assert text.split("\n")[0].count("answered") >= 3  # escaped, and still there
    if form == "json":
        assert len(text.splitlines()) == 1
        assert json.loads(text)["task"] == broken


async def test_a_method_that_does_not_exist_is_one_plain_line(served: Served, lines: Lines) -> None:
    await served.client.request("GET STATUS=200", "/healthz")
    assert lines.last()["status"] == 405
