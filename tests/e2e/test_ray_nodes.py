"""A cluster of Ray that others have started: a head and a worker, each by `ray start`.

They need the extra `ray`, and are skipped without it.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from paths import ROOT
from ray_cluster import (
    ENGINE,
    START_SECONDS,
    Cluster,
    descendants,
    free_port,
    name_of,
    needs_ray,
    tiny_settings,
)

pytestmark = [pytest.mark.e2e, needs_ray]
MANIFEST = ROOT / "docker/kubernetes/crma-ray.yaml"
COMMANDS = Path(sys.executable).parent
OURS = "server"  # a key for generation


@dataclass
class Nodes:
    """Two nodes of a cluster on this machine.

    Attributes:
        head, worker: their processes; the head has the ingress, the worker room for two replicas.
        address, dashboard: of the cluster, for `ray` and for `serve`.
        port: of the server.
        environment: of the head, without secrets.
    """

    head: subprocess.Popen[bytes]
    worker: subprocess.Popen[bytes]
    address: str
    dashboard: str
    port: int
    environment: dict[str, str]
    folder: Path

    @contextmanager
    def server(self, process: subprocess.Popen[bytes]) -> Iterator[Cluster]:
        """The server that a process started, once both replicas serve."""
        served = Cluster(process, f"http://127.0.0.1:{self.port}", self.folder)
        with served.client:
            served.wait_until_ready()
            served.wait_until("replicas", 2.0)
            yield served

    def serve(self, *arguments: str) -> None:
        """Run Serve's command."""
        command = [COMMANDS / "serve", *arguments, "--address", self.dashboard]
        subprocess.run(command, env=self.environment, check=True, timeout=120)


@pytest.fixture(scope="module")
def ray_folder() -> Iterator[str]:
    """For what Ray leaves, such as the address of the last cluster. Names of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        yield folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, ray_folder: str) -> Iterator[Nodes]:
    """As docker/kubernetes/crma-ray.yaml: settings in the environment, secrets on the head."""
    folder = tmp_path_factory.mktemp("nodes")
    settings = {f"CRMA_{name.upper()}": str(value) for name, value in tiny_settings(folder).items()}
    settings.pop("CRMA_ADMIN_KEY")
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    environment = {**os.environ, **settings, **token, "RAY_TMPDIR": ray_folder}
    secrets = {"CRMA_ADMIN_KEY": "admin", "CRMA_API_KEYS": OURS}
    gcs, dashboard = free_port(), free_port()
    address = f"127.0.0.1:{gcs}"
    start = [COMMANDS / "ray", "start", "--block", "--object-store-memory", str(80 * 2**20)]
    start += ["--node-ip-address=127.0.0.1", "--min-worker-port=20000", "--max-worker-port=29999"]
    options = [
        "--num-cpus=1",
        '--resources={"ingress": 1}',
        f"--ray-client-server-port={free_port()}",
    ]
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}"]
    with (
        subprocess.Popen(
            [*start, "--head", *options, *ports], env=environment | secrets, cwd=folder
        ) as head,
        ended(head),
    ):
        wait_for(f"http://127.0.0.1:{dashboard}/api/version", head)
        agent = f"--dashboard-agent-listen-port={free_port()}"
        joined = [*start, "--address", address, "--num-cpus=4", agent]
        joined += ['--resources={"elsewhere": 1}']
        with subprocess.Popen(joined, env=environment, cwd=folder) as worker, ended(worker):
            yield Nodes(
                *(head, worker, address, f"http://127.0.0.1:{dashboard}"),
                *(free_port(), environment, folder),
            )


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Let a process end after the block."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)


def wait_for(address: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody answers at an address, in any way."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, "the node has ended"
        try:
            httpx.get(address, timeout=5)
        except httpx.HTTPError:
            continue
        return
    raise TimeoutError(address)


def replicas_in(node: subprocess.Popen[bytes]) -> int:
    return sum(name_of(each).startswith(ENGINE) for each in descendants(node.pid))


def check_answers(served: Cluster) -> None:
    """Keys are asked for, and both nodes have their part."""
    asked = {"prompt": "one", "task": "medical", "raw": True, "max_tokens": 4}
    answer = httpx.post(f"{served.address}/generate", json=asked, timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    found = httpx.post(
        f"{served.address}/generate",
        json=asked,
        timeout=60,
        headers={"Authorization": f"Bearer {OURS}"},
    )
    assert found.status_code == 200, found.text
    assert found.json()["task"] == "medical"


def test_what_the_manifest_tells_ray_serve_runs_on_a_head_and_a_worker(nodes: Nodes) -> None:
    """The operator of KubeRay passes it to the same address as `serve deploy`."""
    (service,) = (
        each
        for each in yaml.safe_load_all(MANIFEST.read_text("utf-8"))
        if each["kind"] == "RayService"
    )
    config: dict[str, Any] = yaml.safe_load(service["spec"]["serveConfigV2"])
    config["http_options"] = {"host": "127.0.0.1", "port": nodes.port}
    file = nodes.folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    nodes.serve("deploy", str(file))
    with nodes.server(nodes.head) as served:
        check_answers(served)
        assert (replicas_in(nodes.head), replicas_in(nodes.worker)) == (0, 2)
    nodes.serve("shutdown", "-y")


OTHER = """
import sys
import ray
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Other:
    async def __call__(self, request):
        return "other"

ray.init(sys.argv[1])
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(Other.bind(), name="other", route_prefix="/other")
"""


def test_a_server_joins_a_cluster_and_leaves_what_others_run_there(nodes: Nodes) -> None:
    """Its end was the end of Serve, and of every application on the cluster."""
    script = [sys.executable, "-c", OTHER, nodes.address, str(nodes.port)]
    subprocess.run(script, env=nodes.environment, check=True, timeout=120)
    address = f"http://127.0.0.1:{nodes.port}"
    with joining(nodes, "ingress") as process, ended(process):
        with nodes.server(process) as served:
            check_answers(served)
        assert httpx.get(f"{address}/other", timeout=60).text == "other"
    assert process.returncode == 0
    assert httpx.get(f"{address}/other", timeout=60).text == "other"
    assert httpx.get(f"{address}/healthz", timeout=60).status_code == 404
    assert replicas_in(nodes.worker) == 0


def test_a_server_without_keys_on_the_cluster_does_not_start_and_leaves_nothing(
    nodes: Nodes,
) -> None:
    """It was open to all: who started it was on the loopback interface alone."""
    with joining(nodes, "elsewhere", stderr=subprocess.PIPE, text=True) as process:
        _, shown = process.communicate(timeout=START_SECONDS)
    assert process.returncode == 2
    assert "no keys are set" in shown.splitlines()[-1]
    assert replicas_in(nodes.worker) == 0


def joining(nodes: Nodes, place: str, **options: Any) -> subprocess.Popen[Any]:
    """Start a server on the cluster, with its ingress where a resource is."""
    config = nodes.folder / "replicas.yaml"
    keys = {"address": nodes.address, "num_cpus": 2, "ingress_resources": {place: 1}}
    config.write_text(yaml.safe_dump({**keys, "settings": {"port": nodes.port}}))
    command = [sys.executable, "-m", "server.ray", str(config)]
    return subprocess.Popen(command, env=nodes.environment, **options)
