"""server.__main__: what an operator reads when the server does not start."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from paths import ROOT
from server_process import running_script

from server.__main__ import main


def test_what_kubernetes_set_is_named_in_the_log(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("CRMA_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("CRMA_SERVICE_PORT", "8000")
    monkeypatch.setenv("CRMA_PORT", "tcp://10.0.0.1:8000")
    monkeypatch.setenv("CRMA_STORE", str(tmp_path / "typo"))
    assert main() == 2  # the store stops it, and not CRMA_PORT
    shown = capsys.readouterr().err
    assert (
        "Kubernetes set it for a Service: CRMA_PORT, CRMA_SERVICE_HOST, CRMA_SERVICE_PORT" in shown
    )
    assert "CRMA_STORE: There is no folder" in shown


@pytest.mark.parametrize("option", [[], ["--allow-open"]], ids=["refused", "allowed"])
def test_a_server_for_others_starts_without_keys_only_if_told_so(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    option: list[str],
) -> None:
    monkeypatch.setenv("CRMA_HOST", "0.0.0.0")
    monkeypatch.setenv("CRMA_STORE", str(tmp_path / "typo"))
    assert main(option) == 2
    stopped_by = "CRMA_STORE: There is no folder" if option else "CRMA_HOST: 0.0.0.0 can be reached"
    assert capsys.readouterr().err.splitlines()[-1].startswith(stopped_by)


def test_an_option_that_does_not_exist_ends_the_process() -> None:
    """It was ignored in silence."""
    with pytest.raises(SystemExit) as caught:
        main(["--max-num-seqs", "9000"])
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "x"], "CRMA_PORT: Input should be a valid integer"),
        (["--device", "tpu"], "CRMA_DEVICE: Input should be 'auto', 'cpu' or 'cuda'"),
        (["--store", "typo"], "CRMA_STORE: There is no folder typo."),
    ],
)
def test_an_option_is_a_setting_and_comes_before_the_environment(
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CRMA_STORE", "elsewhere")
    assert main(options) == 2
    assert said in capsys.readouterr().err


BROKEN_LATER = """
import sys
from server.__main__ import main
from server.engine.native.model_runner import ModelRunner

forward = ModelRunner.run
num_passes = 0

def run(self, *step):
    global num_passes
    num_passes += 1
    if num_passes > int(sys.argv[1]):
        raise RuntimeError("the device is gone")
    return forward(self, *step)

ModelRunner.run = run
sys.exit(main())
"""


@pytest.mark.parametrize(
    "num_passes",
    [pytest.param(0, id="at the first step", marks=pytest.mark.e2e), pytest.param(1, id="later")],
)
def test_a_server_whose_engine_has_failed_ends_with_code_1(num_passes: int, tmp_path: Path) -> None:
    """It was -15, as after an orderly stop, so that `Restart=on-failure` did nothing."""
    with running_script(BROKEN_LATER, str(num_passes), tmp_path=tmp_path) as (server, address):
        assert server.stderr is not None
        if num_passes:
            assert any(" ready: " in line for line in server.stderr)
            for _ in range(3):
                body = {"prompt": "one", "max_tokens": 2}
                answer = httpx.post(f"{address}/generate", json=body, timeout=30)
                assert answer.status_code == 500
        _, shown = server.communicate(timeout=60)
    assert server.returncode == 1
    assert "the device is gone" in shown


SLOW_START = """
import sys
from crma.core.errors import CrmaError
from server import engines
from server.__main__ import main

start = engines.start_engine

def start_when_told(*given):
    print("the model loads", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip() == "fail":
        raise CrmaError("the model is broken")
    return start(*given)

engines.start_engine = start_when_told
sys.exit(main())
"""


def told(server: subprocess.Popen[str], word: str) -> None:
    """Let the model of SLOW_START load now, or fail."""
    assert server.stdin is not None
    server.stdin.write(word + "\n")
    server.stdin.flush()


@pytest.mark.e2e
def test_a_server_answers_while_its_model_loads(tmp_path: Path) -> None:
    """Probes hung until their time-outs: the port was bound, and nobody answered."""
    with running_script(SLOW_START, tmp_path=tmp_path, CRMA_DRAIN_GRACE_S="0") as (server, address):
        assert server.stderr is not None
        assert any("the model loads" in line for line in server.stderr)
        with httpx.Client(base_url=address, timeout=30) as client:
            assert client.get("/healthz").status_code == 200
            early = client.get("/readyz")
            assert (early.status_code, early.json()["reason"]) == (503, "loading")
            refused = client.post("/generate", json={"prompt": "one", "max_tokens": 2})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
            told(server, "load")
            assert any(" ready: " in line for line in server.stderr)
            assert client.get("/readyz").status_code == 200
            answer = client.post("/generate", json={"prompt": "one", "max_tokens": 2})
            assert answer.status_code == 200
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0


@pytest.mark.e2e
def test_a_model_that_cannot_be_loaded_ends_the_process_with_code_2(tmp_path: Path) -> None:
    with running_script(SLOW_START, tmp_path=tmp_path) as (server, _):
        told(server, "fail")
        _, shown = server.communicate(timeout=60)
    assert server.returncode == 2
    assert shown.splitlines()[-1] == "the model is broken"


HANGING_LOADS = """
import sys
import threading

from crma.store.entry import TaskEntry
from server import drain
from server.__main__ import main

drain.CLOSE_SECONDS = 5
load = TaskEntry.load

def hang(self, shape):
    if threading.current_thread().name.startswith("adapters"):
        print("the load hangs", file=sys.stderr, flush=True)
        threading.Event().wait()
    return load(self, shape)

TaskEntry.load = hang
sys.exit(main())
"""


@pytest.mark.e2e
def test_a_file_system_that_hangs_does_not_keep_the_process_from_ending(tmp_path: Path) -> None:
    """The end waited for the thread of the loads, and for every thread that waited for that."""
    settings = {"CRMA_DRAIN_TIMEOUT_S": "1", "CRMA_ADMIN_KEY": "admin"}
    with running_script(HANGING_LOADS, tmp_path=tmp_path, **settings) as (server, address):
        assert server.stderr is not None
        assert any(" ready: " in line for line in server.stderr)
        headers = {"Authorization": "Bearer admin"}
        with ThreadPoolExecutor() as threads, httpx.Client(base_url=address, timeout=30) as client:
            waiting = threads.submit(client.post, "/adapters/medical/load", headers=headers)
            assert any("the load hangs" in line for line in server.stderr)
            server.terminate()
            assert waiting.result().status_code == 503
        _, shown = server.communicate(timeout=60)
    assert server.returncode == 0
    assert "threads that hang" in shown


@pytest.mark.e2e
def test_only_what_serving_needs_is_imported() -> None:
    """scipy and alembic took a second of every start, and 60 MiB."""
    unneeded = ["scipy", "alembic", "pandas", "matplotlib", "model_signing", "peft", "crma.cli"]
    script = f"import sys, server.__main__; print([n for n in {unneeded} if n in sys.modules])"
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300, check=True)
    assert run.stdout.decode().strip() == "[]"


IS_IT_IMPORTED = """
import sys
from server import __main__ as server, app

def say():
    print("transformers is imported:", "transformers" in sys.modules, file=sys.stderr, flush=True)

app.import_templates = say
sys.exit(server.main())
"""


@pytest.mark.e2e
def test_what_renders_chats_is_imported_once_the_server_is_ready(tmp_path: Path) -> None:
    """To render one question of the base model's took a tenth of every start."""
    with running_script(IS_IT_IMPORTED, tmp_path=tmp_path) as (server, _):
        assert server.stderr is not None
        lines = (line.strip() for line in server.stderr)
        assert any(" ready: " in line for line in lines)
        assert next(lines) == "transformers is imported: False"


NOT_LINUX = """
import errno
import faulthandler
import os
import platform
import resource
import sys
import types

import torch

stat = os.stat
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
set_limit = resource.setrlimit

def check(path):
    if str(path).startswith(("/proc", "/sys")):
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))

def audit(event, arguments):
    if event in ("open", "os.listdir", "os.scandir"):
        check(arguments[0])

def stat_of_others(path, **options):
    check(path)
    return stat(path, **options)

def set_limit_as_macos(which, limits):
    if limits[0] > 10_240:
        raise ValueError("current limit exceeds maximum limit")
    set_limit(which, limits)

sys.addaudithook(audit)
os.stat = stat_of_others
resource.setrlimit = set_limit_as_macos
del os.sched_getaffinity, os.O_PATH, os.fdatasync, os.posix_fadvise
del faulthandler.dump_traceback_later, faulthandler.cancel_dump_traceback_later
platform.machine = lambda: "arm64"
torch.backends.mkldnn.is_available = lambda: False
torch.ops.mkldnn = types.SimpleNamespace()

from server.__main__ import main
status = main()
print("descriptors:", resource.getrlimit(resource.RLIMIT_NOFILE)[0], file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.e2e
def test_a_server_needs_nothing_that_only_linux_has(tmp_path: Path) -> None:
    """macOS has no /proc, allows fewer open files than it says, and its torch has no mkldnn."""
    with running_script(NOT_LINUX, tmp_path=tmp_path, CRMA_DTYPE="auto") as (server, address):
        assert server.stderr is not None
        assert any(" ready: " in line for line in server.stderr)
        for task in (None, "medical"):
            body = {"prompt": "one", "max_tokens": 2, "task": task}
            answer = httpx.post(f"{address}/generate", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
        assert httpx.get(f"{address}/metrics", timeout=60).status_code == 200
        server.terminate()
        _, shown = server.communicate(timeout=120)
    assert server.returncode == 0, shown
    num_descriptors = int(shown.rsplit("descriptors: ", 1)[1])
    assert 256 < num_descriptors <= 10_240
