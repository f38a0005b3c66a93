"""`python -m bench`: our server and its peers on the same load in turn, one line of JSON a row.

`clients/bench/README.md` explains the rows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import asdict, replace
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

from bench.engine import Engine, connect, start_peers, start_server
from bench.goals import INT8, PEFT, SERVER, goals, weight_bytes
from bench.metrics import Key, Metrics, Results, compute_metrics, ratios
from bench.options import START, parse_options
from bench.report import Report
from bench.workloads import (
    ALL_ROWS,
    ARRIVALS_OF,
    LORAS,
    MANY_LORAS,
    RATIOS,
    Workload,
    chosen_rows,
    speed_limit,
)

# Room for all adapters of the rows `churn` and those before them; the default is 32.
ROOM = {"CRMA_MAX_LOADED_ADAPTERS": "80"}
# Configurations of our server: the engine's name in the rows, and the settings that differ from the
# defaults.
SERVERS: dict[str, dict[str, str]] = {SERVER: ROOM, INT8: {**ROOM, "CRMA_QUANTIZATION": "int8"}}


def describe_machine() -> dict[str, Any]:
    """The base model's folder, and the commit, hardware and versions; see `machine.py`."""
    return _json_of("bench.machine", "describe")


def measure_limits() -> Metrics:
    """How fast the machine reads and multiplies; see `limits.py`."""
    return _json_of("bench.limits")


def _json_of(*command: str) -> Any:
    return json.loads(subprocess.check_output([sys.executable, "-m", *command]))


def publish_adapters(folder: Path) -> str:
    """Copy the shipped store into `folder` and publish the adapters that are there in the copy."""
    store = str(shutil.copytree("adapters_store", folder / "store"))
    command = [sys.executable, "-m", "bench.machine", "publish", str(folder), store]
    subprocess.run(command, check=True)
    return store


def start_servers(
    stack: ExitStack, report: Report, names: Collection[str], store: str, repetitions: int
) -> dict[str, Engine]:
    """Measure how long each configuration of our server takes to start, and leave it running.

    Args:
        stack: ends the servers.
        report: gets the rows `start`. The first start is a warm-up and does not count.
        names: of the configurations.
        store: the adapter store to serve; logs are written beside it.
        repetitions: number of starts that count; 0: there are no rows.
    """
    folder = Path(store).parent
    engines = {}
    for name in [name for name in SERVERS if name in names]:
        settings = SERVERS[name]
        own = {"CRMA_STORE": store, "CRMA_EVALUATIONS": str(folder / f"evaluations-{name}")}
        environment = {"CRMA_DEVICE": "cpu", **own, **settings}
        log = folder / f"{name}.log"
        starts: list[Metrics] = []
        for _ in range(repetitions + 1 if repetitions else 0):
            with start_server(environment, log) as (engine, seconds):
                starts.append({"ready_s": seconds, "rss_mib": engine.rss_mib()})
        engines[name], _ = stack.enter_context(start_server(environment, log))
        if starts:
            details = {"settings": settings, **engines[name].details()}
            report.add(START, name, "ready_s", starts[1:], **details)
    return engines


def measure_row(engine: Engine, workload: Workload, seed: str) -> Metrics:
    """Run a workload once.

    Returns:
        The metrics of the requests; with them the engine's memory, the machine's load average and
        the share of a core that the load generator used.
    """
    cpu_before = time.process_time()
    results, duration = engine.run(workload, seed)
    prompt_tokens = workload.prompt_tokens if workload.spread == 1 else None
    metrics = compute_metrics(results, duration, prompt_tokens)
    metrics["generator_cpu"] = (time.process_time() - cpu_before) / duration
    metrics["rss_mib"] = engine.rss_mib()
    metrics["load_average"] = os.getloadavg()[0]
    metrics["arrivals_per_s"] = workload.arrivals_per_s
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
        current: dict[Key, Metrics] = {}
        for (row, workload), (name, engine) in product(rows.items(), engines.items()):
            if not engine.can_serve(workload):
                continue
            load = workload.short() if is_warm_up else workload
            if load.arrival_share is not None:
                reached = current[ARRIVALS_OF, name]["output_tok_s"]
                if not reached:
                    continue  # every request of that row has failed, and is reported
                rate = load.arrival_share * reached / load.new_tokens
                load = replace(load, arrivals_per_s=rate)
            measured = measure_row(engine, load, f"{row} {name} {repetition}")
            current[row, name] = measured
            if not is_warm_up:
                results[row, name].append(measured)
    return results


def measure_all_rows(
    engines: Mapping[str, Engine], groups: Sequence[Mapping[str, Workload]], repetitions: int
) -> tuple[Results, list[Metrics]]:
    """Measure one group of rows after the other, and the machine's limits after each group."""
    results: Results = {}
    limits = []
    for rows in groups:
        results |= measure_rows(engines, rows, repetitions)
        limits.append(measure_limits())
    return results, limits


def best_limits(measured: Sequence[Metrics]) -> dict[str, float]:
    """The largest value of each limit: a disturbed measurement would flatter every share."""
    best = {}
    for name in measured[0]:
        values = [limits[name] or 0 for limits in measured]
        best[name] = max(values)
    return best


def report_rows(
    report: Report,
    rows: Mapping[str, Workload],
    results: Results,
    engines: Mapping[str, Engine],
    limits: Sequence[Metrics],
) -> None:
    """Report the machine's limits, and each row with its share of the best limits measured."""
    report.add("limits", "machine", "read_gb_s", limits)
    best = best_limits(limits)
    for (name, engine), repetitions in results.items():
        workload = rows[name]
        details: dict[str, Any] = {
            "settings": SERVERS.get(engine),
            "workload": asdict(workload),
            **engines[engine].details(),
        }
        if has_limit(workload, engine):
            details["limit"] = speed_limit(workload, best, weight_bytes(engine))
        report.add(name, engine, workload.measure, repetitions, **details)


def has_limit(workload: Workload, engine: str) -> bool:
    """Whether `speed_limit` is a limit of the row's figure, and is known.

    Of products of 8 bits no rate is measured; one request at a time is bound by reading alone.
    """
    if workload.measure == "ttft_p95_s":
        return False
    return weight_bytes(engine) == 2 or workload.measure == "decode_tok_s"


def report_ratios(report: Report, results: Results, engines: Mapping[str, Engine]) -> None:
    """Report how some rows compare with others, repetition by repetition."""
    for (a, b), name in product(RATIOS, engines):
        if (a, name) not in results or (b, name) not in results:
            continue
        found = ratios(main_figures(results, a, name), main_figures(results, b, name))
        repetitions: list[Metrics] = [{"ratio": ratio} for ratio in found]
        report.add(f"{a} / {b}", name, "ratio", repetitions, **engines[name].details())


def report_goals(report: Report, results: Results, limits: Sequence[Metrics]) -> None:
    """Report what was found of each goal."""
    figures = {key: main_figures(results, *key) for key in results}
    best = best_limits(limits)
    for goal in goals({engine for _, engine in results}):
        report.add_goal(goal, goal.found(figures, best))


def main_figures(results: Results, row: str, engine: str) -> list[float | None]:
    """The figure that a row is about, in each repetition."""
    measure = ALL_ROWS[row].measure
    return [metrics[measure] for metrics in results[row, engine]]


def shortened(rows: Mapping[str, Workload]) -> dict[str, Workload]:
    """The rows with a few requests each."""
    return {name: workload.short() for name, workload in rows.items()}


def num_adapters(groups: Sequence[Mapping[str, Workload]]) -> int:
    """How many random adapters the rows need; PEFT itself writes the first eight."""
    named = [workload.base_models() for rows in groups for workload in rows.values()]
    return len(MANY_LORAS) if any(names & {MANY_LORAS[-1]} for names in named) else len(LORAS)


def main() -> int:
    """Run the benchmark; the exit code is 1 if a request failed."""
    options = parse_options(None, __doc__ or "", (*SERVERS, PEFT))
    repetitions = 1 if options.quick else options.repetitions
    groups = chosen_rows(options.rows - {START})
    if options.quick:
        groups = [shortened(rows) for rows in groups]
    origin = describe_machine()
    model = origin.pop("model")
    report = Report(origin)
    with ExitStack() as stack:
        if options.quiet:
            stack.enter_context(redirect_stderr(StringIO()))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peers = stack.enter_context(start_peers(model, folder, num_adapters(groups)))
        limits = [measure_limits()]
        store = publish_adapters(folder)
        engines = {name: connect(url) for name, url in options.urls}
        starts = repetitions if START in options.rows else 0
        engines |= start_servers(stack, report, options.engines, store, starts)
        if PEFT in options.engines:
            engines[PEFT] = peers.engine
        results, later_limits = measure_all_rows(engines, groups, repetitions)
        limits += later_limits
        rows = {name: row for group in groups for name, row in group.items()}
        report_rows(report, rows, results, engines, limits)
        report_ratios(report, results, engines)
        report_goals(report, results, limits)
        sys.stderr.write(report.table() + "\n" + report.goals_table())
    return 1 if report.has_failures else 0


if __name__ == "__main__":
    sys.exit(main())
