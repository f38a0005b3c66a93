"""The Docker files, as far as they can be checked without a Docker engine."""

import http.server
import json
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
from tables import ROOT, metric_families

from server.settings import Settings

READERS = ["docker/alerts.yml", "docker/grafana/dashboards/crma.json"]


def served_names() -> set[str]:
    """The names of all samples that /metrics can have."""
    names = set()
    for family in metric_families():
        ends = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_count", "_sum"),
            "summary": ("_count", "_sum"),
        }
        names.update(family.name + end for end in ends.get(family.type, ("",)))
    return names


@pytest.mark.parametrize("path", READERS)
def test_dashboards_and_alerts_read_metrics_that_exist(path: str) -> None:
    """After a metric was renamed, an alert on its old name would never fire."""
    read = set(re.findall(r"\bcrma_[a-z0-9_]+", (ROOT / path).read_text("utf-8")))
    assert read
    assert read <= served_names()


def test_no_alert_compares_a_counter_with_a_number() -> None:
    """A counter never falls, so such an alert would never clear: take its rate or increase."""
    alerts = (ROOT / "docker/alerts.yml").read_text("utf-8")
    expressions = re.findall(r"^ +expr: (.*)$", alerts, re.MULTILINE)
    assert expressions
    counters = re.compile(r"(?<!rate\()(?<!increase\()\bcrma_\w+(?:_total|_bucket|_sum|_count)\b")
    for expression in expressions:
        assert not counters.search(expression), expression


def test_the_image_and_compose_use_settings_that_exist() -> None:
    known = {f"CRMA_{name.upper()}" for name in Settings.model_fields}
    for path in ("Dockerfile", "docker/compose.yaml", "docker/alerts.yml", "Makefile"):
        assert set(re.findall(r"\bCRMA_[A-Z_]+\b", (ROOT / path).read_text("utf-8"))) <= known, path


def dockerfile_command(instruction: str) -> list[str]:
    """The exec form after `instruction`, with continued lines joined as Docker joins them."""
    joined = (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", "")
    return json.loads(re.findall(rf"^{instruction}.*?(\[.*\])$", joined, re.MULTILINE)[-1])


@pytest.mark.parametrize("ready", [True, False])
def test_the_health_check_passes_only_when_ready(tmp_path: Path, ready: bool) -> None:
    """A file server stands in for the server: /readyz is a file, or a 404."""
    if ready:
        (tmp_path / "readyz").touch()
    files = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.HTTPServer(("127.0.0.1", 0), files) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        command = [sys.executable, *dockerfile_command("HEALTHCHECK")[1:]]
        done = subprocess.run(
            command, env={"CRMA_PORT": str(server.server_port)}, check=False, timeout=30
        )
        thread.join()
    assert done.returncode == (0 if ready else 1)


def test_the_start_command_is_valid_shell_and_ends_in_the_server() -> None:
    shell, option, script = dockerfile_command("CMD")
    assert (shell, option) == ("sh", "-c")
    assert subprocess.run([shell, "-n", option, script], check=False).returncode == 0
    assert "exec python -m server" in script, "the server must be the process that gets SIGTERM"
