"""server.engine.native.step_watchdog: a process whose step hangs ends, whatever holds it."""

import faulthandler
import os
import subprocess
import sys

import pytest
import tiny
from scripted_engine import TINY

from server.engine.native import step_watchdog
from server.engine.native.async_engine import AsyncEngine
from server.engine.native.step_watchdog import StepWatchdog

SCRIPT = """
import asyncio, ctypes
import tiny
import tiny_configs
from server.engine.inference_engine import ServedModel
from server.engine.native.async_engine import AsyncEngine
from server.engine.native.step_watchdog import StepWatchdog

core, _ = tiny.make_engine(tiny.injection(), {})
forward = core.runner.run
sleep_without_lock = ctypes.CDLL(None).usleep
sleep_with_lock = ctypes.PyDLL(None).usleep  # it keeps the interpreter's lock
passes = iter(
    [(sleep_without_lock, 1, False)]  # the first step
    + [(sleep_without_lock, 0.5, True)] * 2 + [(sleep_without_lock, 0.5, False)] * 3
    + [(sleep_with_lock, 0.9, False)] * 1000
)

def run(*step):
    sleep, seconds, fails = next(passes)
    for _ in range(1 if sleep is sleep_without_lock else 1000):
        sleep(int(seconds * 1e6))
    if fails:
        raise RuntimeError("injected")
    return forward(*step)

core.runner.run = run

async def main():
    model = ServedModel("tiny", "sha256:" + "a" * 64, "float32", 400, tiny_configs.VOCAB)
    engine = AsyncEngine(core, model, 8, StepWatchdog(0.8))
    await engine.warm_up()
    print("the first step has taken its time", flush=True)
    for name in ("slow", "hangs"):
        async for output in engine.submit(tiny.ask(name, n=4, max_tokens=1)):
            print(name, output.finish_reason, flush=True)

asyncio.run(main())
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What faulthandler is asked for, and does not do here."""
    asked: list[str] = []
    for name in ("dump_traceback_later", "cancel_dump_traceback_later"):
        monkeypatch.setattr(faulthandler, name, lambda *_, name=name, **__: asked.append(name))
    return asked


def test_passes_one_after_another_do_not_start_a_thread_each(calls: list[str]) -> None:
    """faulthandler starts one whenever it is armed, which takes a tenth of a short step."""
    watchdog = StepWatchdog(3600)
    for _ in range(3):
        watchdog.arm()
    watchdog.disarm()
    watchdog.disarm()
    watchdog.arm()
    assert calls == ["dump_traceback_later", "cancel_dump_traceback_later", "dump_traceback_later"]


def test_it_is_armed_anew_while_every_pass_still_has_its_full_time(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(step_watchdog.time, "monotonic", lambda: now[0])
    watchdog = StepWatchdog(50)
    for now[0] in (100.0, 104.9, 105.0, 109.9, 110.1):
        watchdog.arm()
    assert len(calls) == 3  # at 100, 105 and 110.1


@pytest.mark.parametrize("stays_busy", [False, True])
async def test_nothing_is_watched_once_the_engine_waits_or_has_ended(
    calls: list[str], stays_busy: bool
) -> None:
    core, _ = tiny.make_engine(tiny.injection(), {})
    engine = AsyncEngine(core, TINY, 8, StepWatchdog(3600))
    await engine.warm_up()
    outputs = engine.submit(tiny.ask("one", max_tokens=300))
    assert (await anext(outputs)).error is None
    if not stays_busy:
        async for _ in outputs:
            pass
    await engine.close()
    await outputs.aclose()
    assert calls[-1] == "cancel_dump_traceback_later"
    assert "dump_traceback_later" in calls


@pytest.mark.e2e
def test_a_step_that_hangs_ends_the_process_and_a_slow_one_that_moves_does_not() -> None:
    """It hangs in native code that keeps the interpreter's lock: no other Python code can run.

    The slow step fails and is tried again in parts, each within the time.
    """
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = ended.stdout.splitlines()
    assert lines[0] == "the first step has taken its time", ended.stderr
    assert lines[1:] == ["slow length"] * 4
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
    assert "step_runner.py" in ended.stderr
