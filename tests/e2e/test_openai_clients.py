"""Other people's OpenAI clients against the real server, unchanged.

Each client is a script in `openai_clients/` that fails if an answer is not what the client needs.
They run in environments of their own, with the versions that the files there pin: `make clients`.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from paths import ROOT
from server_process import running_server

from crma.models.base_model import find_base

pytestmark = pytest.mark.e2e

FOLDER = Path(__file__).parent / "openai_clients"
ENVIRONMENTS = ROOT / ".venv-clients"


class Script(NamedTuple):
    """A client's script, the environment that it runs in, and the package that it tries."""

    path: str
    environment: str
    package: str


SCRIPTS = [
    Script("openai_sdk.py", "common", "openai"),
    Script("litellm_client.py", "common", "litellm"),
    Script("langchain_client.py", "common", "langchain-openai"),
    Script("llama_index_client.py", "llama-index", "llama-index-llms-openai-like"),
    Script("instructor_client.py", "instructor", "instructor"),
    Script("autogen_client.py", "common", "autogen-ext"),
    Script("pydantic_ai_client.py", "common", "pydantic-ai-slim"),
    Script("inspect_client.py", "common", "inspect-ai"),
    Script("llm_command.py", "common", "llm"),
]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server() as address:
        yield address


def run(command: list[str], name: str, version: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a script, and print what was tried. Fails with the script's own last lines."""
    found = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=300)
    result = "passed" if found.returncode == 0 else "failed"
    with capsys.disabled():
        sys.stderr.write(f"\n{name} {version}: {result}\n")
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.parametrize("model", ["base", "medical"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.package)
def test_a_python_client_works_unchanged(
    script: Script, model: str, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    python = ENVIRONMENTS / script.environment / "bin" / "python"
    if not python.exists():
        pytest.skip("not installed: make clients")
    pins = (FOLDER / f"{script.environment}.txt").read_text().splitlines()
    (version,) = [line.split("==")[1] for line in pins if line.startswith(f"{script.package}==")]
    command = [str(python), script.path, address, model]
    run(command, f"{script.package} ({model})", version, capsys)


@pytest.mark.parametrize("model", ["base", "medical"])
def test_the_ai_sdk_works_unchanged(
    model: str, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    node = shutil.which("node")
    packages = ENVIRONMENTS / "node" / "node_modules"
    if node is None or not packages.exists():
        pytest.skip("not installed: make clients, where there is Node.js")
    version = json.loads((FOLDER / "package.json").read_text())["dependencies"]["ai"]
    script = shutil.copy(FOLDER / "ai_sdk.mjs", tmp_path)  # Node looks for packages beside a script
    (tmp_path / "node_modules").symlink_to(packages)
    run([node, script, address, model], f"ai ({model})", version, capsys)


@pytest.mark.parametrize(
    ("backend", "endpoint"),
    [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")],
)
def test_vllm_benchmarks_the_server_as_it_does_its_own(
    backend: str, endpoint: str, address: str, tmp_path: Path
) -> None:
    vllm = ENVIRONMENTS / "vllm" / "bin" / "vllm"
    if not vllm.exists():
        pytest.skip("not installed: put vllm into .venv-clients/vllm")
    command = [str(vllm), "bench", "serve", "--base-url", address, "--model", "base"]
    command += ["--backend", backend, "--endpoint", endpoint, "--tokenizer", str(find_base().path)]
    command += ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "8"]
    command += ["--num-prompts", "8", "--lora-modules", "medical", "legal"]
    command += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "result.json"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    found = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["completed"] == 8, found.stderr[-3000:]
    assert result["total_output_tokens"] == 8 * 8


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_guidellm_benchmarks_the_server(path: str, address: str, tmp_path: Path) -> None:
    guidellm = ENVIRONMENTS / "guidellm" / "bin" / "guidellm"
    if not guidellm.exists():
        pytest.skip("not installed: put guidellm into .venv-clients/guidellm")
    report = tmp_path / "report.json"
    command = [str(guidellm), "run", "--profile", "kind=concurrent,streams=2", "--disable-console"]
    backend = {"kind": "openai_http", "target": address, "request_format": path, "model": "medical"}
    command += ["--backend", json.dumps(backend)]
    command += ["--tokenizer", f"kind=huggingface_auto,model={find_base().path}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"]
    command += ["--constraint", "kind=max_requests,count=4", "--output", f"kind=json,path={report}"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=offline, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (4, 0)
