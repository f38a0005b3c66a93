"""The audit log: private, appended to, and never in the way."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from crma.core.errors import ConfigError
from server.service.audit import Act, Audit


def test_acts_are_appended_as_json_lines_to_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "audit.jsonl"
    audit = Audit(file)
    audit.check()
    audit.write(Act("boss", "pin", {"task": "legal", "version": None}))
    file.rename(tmp_path / "old")  # as log rotation does
    audit.write(Act("boss", "unpin", {"task": "le\ngal"}, "not_found"))
    lines = [json.loads(path.read_text()) for path in (tmp_path / "old", file)]
    times = [line.pop("time") for line in lines]
    assert lines == [
        {"what": "pin", "who": "boss", "task": "legal", "result": "done"},
        {"what": "unpin", "who": "boss", "task": "le\ngal", "result": "not_found"},
    ]
    assert times == sorted(times)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_server_does_not_start_on_an_audit_log_that_cannot_be_written(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"  # whose reader the start waited for
    os.mkfifo(pipe)
    for file in (tmp_path, tmp_path / "nowhere" / "audit.jsonl", pipe):
        with pytest.raises(ConfigError) as caught:
            Audit(file).check()
        assert caught.value.field == "audit_log"


def test_an_act_that_cannot_be_written_is_an_error_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Audit(tmp_path).write(Act("boss", "pin"))
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR"]
