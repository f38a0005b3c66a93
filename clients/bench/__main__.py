"""`python -m bench`: our server and its peers on the same load in turn, one line of JSON a row.

`clients/bench/README.md` explains the rows.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

from bench.engine import Engine, Peers, connect, start_peers, start_server
from bench.metrics import Metrics, compute_metrics
from bench.report import Report
from bench.workloads import CRMA_ROWS, RATIOS, ROWS, Workload, speed_limit

# Configurations of our server: the engine's name in the rows, and the settings that differ from the
# defaults.
SERVERS: dict[str, dict[str, str]] = {"server": {}, "int8": {"CRMA_QUANTIZATION": "int8"}}

Results = dict[tuple[str, str], list[Metrics]]
"""(row, engine) -> the metrics of each repetition."""


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few requests, once: shows that the benchmark works; the figures mean nothing",
    )
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        type=_name_and_url,
        metavar="NAME=URL",
        dest="urls",
        help="also measure the server that is running at URL; may be repeated",
    )
    parser.add_argument("--quiet", action="store_true", help="nothing on stderr")
    return parser.parse_args()


def _name_and_url(text: str) -> tuple[str, str]:
    name, _, url = text.partition("=")
    if not name or not url:
        raise argparse.ArgumentTypeError(f"must be NAME=URL, not {text!r}")
    return name, url


def describe_machine() -> dict[str, Any]:
    """The base model's folder, and the commit, hardware and versions; see `machine.py`."""
    command = [sys.executable, "-m", "bench.machine", "describe"]
    description: dict[str, Any] = json.loads(subprocess.check_output(command))
    return description


def publish_adapters(folder: Path) -> str:
    """Copy the shipped store into `folder` and publish the adapters that are there in the copy."""
    store = str(shutil.copytree("adapters_store", folder / "store"))
    command = [sys.executable, "-m", "bench.machine", "publish", str(folder), store]
    subprocess.run(command, check=True)
    return store


def start_servers(
    stack: ExitStack, report: Report, store: str, folder: Path, repetitions: int
) -> dict[str, Engine]:
    """Measure how long each configuration of our server takes to start, and leave it running.

    Args:
        stack: ends the servers.
        report: gets the rows `start`. The first start is a warm-up and does not count.
        store: the adapter store to serve.
        folder: for the servers' log.
        repetitions: number of starts that count.
    """
    log = folder / "log"
    engines = {}
    for name, settings in SERVERS.items():
        own = {"CRMA_STORE": store, "CRMA_EVALUATIONS": str(folder / "evaluations")}
        environment = {"CRMA_DEVICE": "cpu", **own, **settings}
        starts: list[Metrics] = []
        for _ in range(repetitions + 1):
            with start_server(environment, log) as (_, seconds):
                starts.append({"ready_s": seconds})
        report.add("start", name, "ready_s", starts[1:], settings=settings)
        engines[name], _ = stack.enter_context(start_server(environment, log))
    return engines


def measure_row(engine: Engine, workload: Workload, seed: str) -> Metrics:
    """Run a workload once.

    Returns:
        The metrics of the requests; with them the engine's memory, the machine's load average and
        the share of a core that the load generator used.
    """
    cpu_before = time.process_time()
    results, duration = engine.run(workload, seed)
    metrics = compute_metrics(results, duration, workload.prompt_tokens)
    metrics["generator_cpu"] = (time.process_time() - cpu_before) / duration
    metrics["rss_mib"] = engine.rss_mib()
    metrics["load_average"] = os.getloadavg()[0]
    errors = sorted({result.error for result in results if result.error})
    sys.stderr.write(f"{seed}: {duration:.1f} s {', '.join(errors)}\n")
    return metrics


def measure_rows(
    engines: Mapping[str, Engine], rows: Mapping[str, Workload], repetitions: int
) -> Results:
    """Measure every row on every engine that has its models.

    The engines take turns row by row, and all of it is repeated, so that a disturbance of the
    machine does not fall on one engine. The first round is a short warm-up and does not count.
    """
    results: Results = defaultdict(list)
    for repetition in range(repetitions + 1):
        is_warm_up = repetition == 0
        for (row, workload), (name, engine) in product(rows.items(), engines.items()):
            if not engine.can_serve(workload):
                continue
            seed = f"{row} {name} {repetition}"
            if is_warm_up:
                measure_row(engine, workload.short(), seed)
            else:
                results[row, name].append(measure_row(engine, workload, seed))
    return results


def measure_all_rows(
    engines: Mapping[str, Engine],
    groups: Sequence[Mapping[str, Workload]],
    repetitions: int,
    peers: Peers,
) -> tuple[Results, list[Metrics]]:
    """Measure one group of rows after the other, and the machine's limits after each group."""
    results: Results = {}
    limits = []
    for rows in groups:
        results |= measure_rows(engines, rows, repetitions)
        limits.append(peers.measure_limits())
    return results, limits


def best_limits(measured: Sequence[Metrics]) -> dict[str, float]:
    """The largest value of each limit: a disturbed measurement would flatter every share."""
    best = {}
    for name in measured[0]:
        values = [limits[name] or 0 for limits in measured]
        best[name] = max(values)
    return best


def report_rows(
    report: Report, rows: Mapping[str, Workload], results: Results, limits: Sequence[Metrics]
) -> None:
    """Report the machine's limits, and each row with its share of the best limits measured."""
    report.add("limits", "machine", "read_gb_s", limits)
    best = best_limits(limits)
    for (name, engine), repetitions in results.items():
        workload = rows[name]
        details: dict[str, Any] = {"settings": SERVERS.get(engine), "workload": asdict(workload)}
        if engine != "int8":  # the limits hold for weights in bf16
            details["limit"] = speed_limit(workload, best)
        report.add(name, engine, workload.measure, repetitions, **details)


def report_ratios(
    report: Report, rows: Mapping[str, Workload], results: Results, engines: Mapping[str, Engine]
) -> None:
    """Report how some rows compare with others, repetition by repetition."""
    for (a, b), engine in product(RATIOS, engines):
        if (a, engine) not in results or (b, engine) not in results:
            continue
        pairs = zip(results[a, engine], results[b, engine], strict=True)
        ratios: list[Metrics] = [
            {"ratio": _ratio(of_a[rows[a].measure], of_b[rows[b].measure])} for of_a, of_b in pairs
        ]
        report.add(f"{a} / {b}", engine, "ratio", ratios)


def _ratio(a: float | None, b: float | None) -> float | None:
    if a is None or not b:
        return None
    return a / b


def shortened(rows: Mapping[str, Workload]) -> dict[str, Workload]:
    """The rows with a few requests each."""
    return {name: workload.short() for name, workload in rows.items()}


def main() -> int:
    """Run the benchmark; the exit code is 1 if a request failed."""
    options = parse_options()
    repetitions = 3
    # The rows with the shipped tasks come last: until then the servers' memory holds the eight
    # random adapters only.
    groups = [ROWS, CRMA_ROWS]
    if options.quick:
        repetitions = 1
        groups = [shortened(ROWS), shortened(CRMA_ROWS)]
    origin = describe_machine()
    model = origin.pop("model")
    report = Report(origin)
    with ExitStack() as stack:
        if options.quiet:
            stack.enter_context(redirect_stderr(StringIO()))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = stack.enter_context(start_peers(model, folder))
        limits = [peers.measure_limits()]
        store = publish_adapters(folder)
        engines = {name: connect(url) for name, url in options.urls}
        engines |= start_servers(stack, report, store, folder, repetitions)
        engines["peft"] = peers.engine
        results, later_limits = measure_all_rows(engines, groups, repetitions, peers)
        rows = groups[0] | groups[1]
        report_rows(report, rows, results, limits + later_limits)
        report_ratios(report, rows, results, engines)
        sys.stderr.write(report.table())
    return 1 if report.has_failures else 0


if __name__ == "__main__":
    sys.exit(main())
