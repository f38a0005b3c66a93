"""The client as its users have it: its wheel in a fresh environment, on the lines of its README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from server_process import running_server

pytestmark = pytest.mark.e2e

CLIENT = ROOT / "clients" / "python"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the client's wheel and what that needs."""
    folder = tmp_path_factory.mktemp("fresh")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    source = folder / "source"
    subprocess.run(["cp", "-r", str(CLIENT), str(source)], check=True)  # building leaves files
    subprocess.run([*pip, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    fresh = folder / "venv" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    install = [str(fresh), "-m", "pip", "install", "-q", "-c", constraints, str(wheel)]
    subprocess.run(install, check=True)
    return fresh


def run(python: Path, script: str, folder: Path) -> str:
    """Stdout of a script outside the checkout, without its paths."""
    command = [str(python), "-I", "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_needs_httpx_and_brings_its_types(python: Path, tmp_path: Path) -> None:
    script = """
import sys, pathlib, crma_client
from importlib.metadata import requires, version
print(requires("crma-client"), pathlib.Path(crma_client.__file__).with_name("py.typed").exists())
print([name for name in ("torch", "numpy", "pydantic", "crma", "server") if name in sys.modules])
"""
    needs, heavy = run(python, script, tmp_path).splitlines()
    assert needs == "['httpx>=0.28'] True"
    assert heavy == "[]"


def test_the_lines_of_the_readme_run(python: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.DOTALL)
    settings = {"CRMA_EVALUATIONS": str(tmp_path / "kept"), "CRMA_DTYPE": "bfloat16"}
    with running_server(**settings) as address:
        shown = run(python, example.replace("http://127.0.0.1:8000", address), tmp_path)
    lines = shown.splitlines()
    assert re.fullmatch(r".+ \d+ sha256:[0-9a-f]{64}", lines[0])
    assert "200 200" in lines  # the progress at the end
    assert [line.split()[0] for line in lines[-2:]] == ["task+crma", "task"]


PROGRAM = """
from crma_client import AsyncClient, Client


def blocking(client: Client) -> list[str]:
    whole: str = client.generate("Hi", task="medical", crma=True, max_tokens=3).text
    with client.stream("Hi", temperature=0.5) as stream:
        texts: list[str] = [token.text for token in stream]
    reason: str = stream.result.finish_reason
    chat: str = client.chat([{"role": "user", "content": "Hi"}], seed=3).text
    client.generate("Hi", max_token=3)  # wrong
    client.generate("Hi", max_tokens="3")  # wrong
    client.generate("Hi", tools=[])  # wrong
    client.chat([], raw=True)  # wrong
    client.unload_adapter("medical", "later")  # wrong
    number: int = client.generate("Hi").text  # wrong
    return [whole, *texts, reason, chat]


async def awaited(client: AsyncClient) -> list[str]:
    whole: str = (await client.generate("Hi", task="medical")).text
    async with client.stream_chat([], max_tokens=3) as stream:
        texts: list[str] = [token.text async for token in stream]
    await client.generate("Hi", max_token=3)  # wrong
    client.generate("Hi").text  # wrong
    async for token in client.stream("Hi"):  # wrong
        pass
    return [whole, *texts, stream.result.text]
"""


def test_programs_of_users_are_type_checked(python: Path, tmp_path: Path) -> None:
    """A misspelt option, a wrong type and a forgotten await are found before anything runs."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    command += ["--cache-dir", "kept", "--python-executable", str(python), "program.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    told = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    lines = PROGRAM.splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert told == wrong, done.stdout + done.stderr
