"""Every panel of the dashboard, and every alert, against a real Prometheus and a server under load.

Debian's package `prometheus` has the program.
"""

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import api_keys
import httpx
import pytest
import yaml
from paths import ROOT
from server_process import running_server
from tiny import filled_store, publish_backbone, pulled_base

from crma.store.adapter_store import AdapterStore

PROMETHEUS = shutil.which("prometheus")
DASHBOARD = ROOT / "docker" / "grafana" / "dashboards" / "crma.json"
LOAD_S = 20.0
WINDOW = "15s"  # of $__rate_interval

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        PROMETHEUS is None, reason="prometheus is not installed: apt-get install prometheus"
    ),
]


def queries() -> list[tuple[str, str]]:
    """(title, query) of every target of every panel."""
    dashboard = json.loads(DASHBOARD.read_text("utf-8"))
    found = []
    for panel in dashboard["panels"]:
        exprs = [target["expr"].replace("$__rate_interval", WINDOW) for target in panel["targets"]]
        found += [(panel["title"], expr) for expr in exprs]
    return found


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def scraping(folder: Path, server: str, key: str = "") -> Iterator[httpx.Client]:
    """Prometheus with our configuration, which scrapes `server`; and a client of its API.

    Args:
        key: of the metrics; empty: they need none.
    """
    assert PROMETHEUS is not None
    config = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text("utf-8"))
    config["rule_files"] = [str(ROOT / "docker" / "alerts.yml")]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job in config["scrape_configs"]:
        job["static_configs"] = [{"targets": [server.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (folder / "crma.key").write_text(key)
    port = free_port()
    command = [
        PROMETHEUS,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (
        subprocess.Popen(command, cwd=folder) as process,
        httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as client,
    ):
        try:
            yield client
        finally:
            process.terminate()


def promoted_store(folder: Path, base: Any) -> AdapterStore:
    """The tiny store, whose backbone was promoted with a measured drift."""
    store = filled_store(folder, base)
    first = store.backbone()
    assert first is not None
    second = publish_backbone(store, base, 1, lineage=(first.digest,), serve=False)
    scores = {"medical": {"loss": 1.0, "drift": 0.5, "change": 0.5}}
    evidence = {"lambda": 1.0, "tried": [{"lambda": 1.0, "harmed": [], "tasks": scores}]}
    store.set_serving({"backbone": second.version}, evidence=evidence)
    return store


def load(server: str, seconds: float) -> None:
    """Requests of every kind, and an ablation, for some seconds."""
    end = time.monotonic() + seconds
    with httpx.Client(base_url=server, timeout=60) as client:
        body = {"question_set": "public", "variants": ["task", "base"]}
        assert client.post("/ablation", json=body).status_code == 200
        while time.monotonic() < end:
            for task, crma in (("medical", True), ("legal", False), (None, True)):
                asked = {"prompt": "Hi there", "task": task, "crma": crma, "max_tokens": 16}
                client.post("/generate", json={**asked, "ignore_eos": True})
            client.post("/generate", json={"prompt": "Hi", "max_tokens": 400, "timeout_s": 0.001})
            client.post("/generate", json={"prompt": "Hi", "task": "nowhere"})


def test_prometheus_shows_the_key_of_a_server_that_asks_for_one(tmp_path: Path) -> None:
    base = pulled_base(tmp_path)
    keys = tmp_path / "keys.json"
    api_keys.add(keys, "narrow", tasks=["medical"])
    header = api_keys.add(keys, "prometheus", "metrics")["Authorization"]
    settings = {
        "CRMA_HOME": str(base.path.parents[1]),
        "CRMA_MODEL": base.name,
        "CRMA_STORE": str(filled_store(tmp_path / "store", base).root),
        "CRMA_EVALUATIONS": str(tmp_path / "evaluations"),
        "CRMA_KEYS_FILE": str(keys),
    }
    with running_server(**settings) as server:
        assert httpx.get(f"{server}/metrics").status_code == 401
        for key, is_up in ((header.removeprefix("Bearer "), 1.0), ("", 0.0)):
            folder = tmp_path / f"prometheus-{is_up}"
            folder.mkdir()
            with scraping(folder, server, key) as client:
                assert first_value(client, "up") == is_up


def value_of(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = client.get("/query", params={"query": query})
    assert answer.status_code == 200, f"{query}: {answer.text}"
    return answer.json()["data"]["result"]


def first_value(client: httpx.Client, query: str) -> float:
    """The value of a query, once Prometheus runs and has one."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(httpx.TransportError, AssertionError):
            found = value_of(client, query)
            if found:
                return float(found[0]["value"][1])
        time.sleep(0.2)
    raise TimeoutError(query)


def test_every_panel_has_data_under_load_and_no_alert_fires(tmp_path: Path) -> None:
    base = pulled_base(tmp_path)
    store = promoted_store(tmp_path / "store", base)
    settings = {
        "CRMA_HOME": str(base.path.parents[1]),
        "CRMA_MODEL": base.name,
        "CRMA_STORE": str(store.root),
        "CRMA_EVALUATIONS": str(tmp_path / "evaluations"),
        "CRMA_METRICS_COMPAT": "true",
        "CRMA_MAX_MODEL_LEN": "512",
    }
    with running_server(**settings) as server, scraping(tmp_path, server) as client:
        load(server, LOAD_S)
        empty = []
        for title, query in queries():
            values = [float(each["value"][1]) for each in value_of(client, query)]
            if not any(value == value for value in values):  # NaN is no data
                empty.append(f"{title}: {query}")
        vllm = f'rate(vllm:generation_tokens_total{{model_name="{base.name}"}}[15s])'
        (generated,) = value_of(client, vllm)
        alerts = client.get("/alerts").json()["data"]["alerts"]
        rules = client.get("/rules").json()["data"]["groups"][0]["rules"]
    assert empty == []
    assert float(generated["value"][1]) > 0
    assert [rule["health"] for rule in rules] == ["ok"] * len(rules)
    assert [alert["labels"] for alert in alerts if alert["state"] == "firing"] == []
