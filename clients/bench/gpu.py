"""`python -m bench.gpu`: our server on a GPU, a line of JSON a row, with its share of the limits.

The rows are some of those of `python -m bench`. A decoding row's limit is the device's memory
bandwidth, or the rate of its products where that is less.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.__main__ import describe_machine, measure_rows, shortened
from bench.engine import start_server
from bench.report import Report
from bench.workloads import CRMA_ROWS, ROWS, speed_limit

NAMES = ("single", "base", "mixed", "prefill", "prefill-lora", "crma-off", "crma-on")
CHOSEN = {name: row for name, row in {**ROWS, **CRMA_ROWS}.items() if name in NAMES}


def main() -> int:
    """Run the benchmark; the exit code is 1 if a request failed."""
    parser = argparse.ArgumentParser(prog="bench.gpu")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few requests, once: shows that the benchmark works; the figures mean nothing",
    )
    parser.add_argument("--record", type=Path, help="file for the rows; left out: stdout")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.record is not None:
            stack.enter_context(redirect_stdout(stack.enter_context(options.record.open("w"))))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        report = measure(stack, folder, options.device, is_quick=options.quick)
    sys.stderr.write(report.table())
    return 1 if report.has_failures else 0


def measure(stack: ExitStack, folder: Path, device: str, *, is_quick: bool) -> Report:
    """Measure the limits, then the rows on a server, which the stack ends.

    Args:
        folder: for the adapters and the server's log.
        is_quick: a few requests, once.
    """
    origin = describe_machine()
    model = origin.pop("model")
    limits = json.loads(_run("bench.device", "limits", model, device))
    report = Report({**origin, "limits": limits})
    settings = {
        "CRMA_DEVICE": device,
        "CRMA_STORE": _publish(model, folder),
        "CRMA_EVALUATIONS": str(folder / "evaluations"),
    }
    server, seconds = stack.enter_context(start_server(settings, folder / "log"))
    report.add("start", "server", "ready_s", [{"ready_s": seconds}])
    rows = shortened(CHOSEN) if is_quick else CHOSEN
    results = measure_rows({"server": server}, rows, 1 if is_quick else 2)
    for (name, engine), repetitions in results.items():
        details: dict[str, Any] = {
            "limit": speed_limit(rows[name], limits),
            "workload": asdict(rows[name]),
        }
        report.add(name, engine, rows[name].measure, repetitions, **details)
    return report


def _publish(model: str, folder: Path) -> str:
    """A copy of the shipped store that has the random adapters of the rows too."""
    store = str(shutil.copytree("adapters_store", folder / "store"))
    _run("bench.device", "adapters", model, str(folder))
    _run("bench.machine", "publish", str(folder), store)
    return store


def _run(*command: str) -> bytes:
    """What a module writes, in a process of its own."""
    return subprocess.check_output([sys.executable, "-m", *command])


if __name__ == "__main__":
    sys.exit(main())
