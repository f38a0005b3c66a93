"""server.engine.native.step_watchdog: a process whose step hangs ends, whatever holds it."""

import os
import subprocess
import sys

import pytest

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
