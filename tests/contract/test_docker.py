"""The Docker files, as far as they can be checked without a Docker engine."""

import http.server
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import yaml
from dockerfile import Dockerfile
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
    """The exec form after `instruction` in the last stage."""
    return Dockerfile.read().stages[-1].command(instruction)


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


def services() -> dict:
    return yaml.safe_load((ROOT / "docker/compose.yaml").read_text("utf-8"))["services"]


def test_every_base_image_is_named_by_its_digest() -> None:
    """A tag can be another image tomorrow."""
    images = [stage.base for stage in Dockerfile.read().stages if not stage.is_local]
    images += [service["image"] for service in services().values() if "image" in service]
    assert len(images) == 4
    for image in images:
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", image), image


def test_the_last_stage_has_no_compiler_and_installs_nothing() -> None:
    """The image came with g++, so whoever broke in could build."""
    runs = [text for name, text in Dockerfile.read().stages[-1].steps if name == "RUN"]
    assert not any(re.search(r"apt-get|g\+\+|pip", text) for text in runs), runs


def test_all_packages_of_the_image_come_with_hashes() -> None:
    steps = [step for stage in Dockerfile.read().stages for step in stage.steps]
    commands = [part for name, text in steps if name == "RUN" for part in text.split("&&")]
    installs = [each for each in commands if "pip install" in each]
    assert len(installs) == 3
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or "--no-build-isolation -e ." in install


def test_the_server_has_one_volume_to_write_to_and_is_nobody_special() -> None:
    server = services()["server"]
    assert server["read_only"]
    assert server["cap_drop"] == ["ALL"]
    writable = [each for each in server["volumes"] if not each.endswith(":ro")]
    assert writable == ["models:/var/lib/crma"]
    steps = Dockerfile.read().stages[-1].steps
    assert ("USER", "10001") in steps
    assert not any("chown" in text for name, text in steps if name == "COPY")


def test_compose_neither_serves_without_a_key_nor_has_a_known_password() -> None:
    """Without CRMA_API_KEYS it served everyone; Grafana had admin/admin."""
    started = services()
    assert started["server"]["environment"]["CRMA_API_KEYS"].startswith("${CRMA_API_KEYS:?")
    grafana = started["grafana"]["environment"]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    for service in started.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_the_server_on_a_gpu_is_the_same_but_for_its_torch_and_its_device() -> None:
    """It is left out unless it is asked for, and Prometheus finds it under the other's name."""
    plain, on_gpu = services()["server"], services()["server-gpu"]
    assert on_gpu["profiles"] == ["gpu"]
    assert on_gpu["build"] == {"context": plain["build"], "args": {"TORCH": "cuda"}}
    (device,) = on_gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert on_gpu["networks"]["default"]["aliases"] == ["server"]
    own = {"profiles", "build", "deploy", "networks"}
    assert {key: on_gpu[key] for key in on_gpu.keys() - own} == {
        key: plain[key] for key in plain.keys() - own
    }
