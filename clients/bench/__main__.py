"""`python -m bench`: our server and its peers on the same load in turn, one JSON line a row; README.md says how."""

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
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from bench.engine import LORAS, Engine, peers, running, serving
from bench.latency import measures, spread
from bench.load import Workload

SERVERS: dict[str, dict[str, str]] = {
    "server": {},
    "int8": {"CRMA_QUANTIZATION": "int8"},
}  # a row's name and its settings, beside the defaults

TASKS = ("code", "finance", "legal", "medical", "science")
ON, OFF = (tuple(f"{task}:crma-{state}" for task in TASKS) for state in ("on", "off"))
PREFILL = Workload("prefill_tok_s", num_requests=4, concurrency=1, prompt_tokens=512, new_tokens=1)
ROWS = {
    "mixed": Workload(models=LORAS),
    "base": Workload(),
    "single": Workload("decode_tok_s", num_requests=1, concurrency=1),
    "prefill": PREFILL,
    "prefill-lora": replace(PREFILL, models=LORAS[3:4]),
}
CRMA_ROWS = {  # five tasks are an odd number: with every other request on, each task is on and off in turn
    "crma-off": Workload(models=OFF),
    "crma-half": Workload(models=tuple((OFF, ON)[i % 2][i % 5] for i in range(10))),
    "crma-on": Workload(models=ON),
}
RATIOS = (
    ("mixed", "base"),
    ("prefill-lora", "prefill"),
    ("crma-half", "crma-off"),
    ("crma-on", "crma-off"),
)
ORIGIN = """
import json; from crma.core.provenance import commit, hardware
from crma.models.base_model import find_base, DEFAULT_MODEL
print(json.dumps({"model": str(find_base(DEFAULT_MODEL).path), "commit": commit(), "hardware": hardware()}))
"""
PUBLISH = """
import sys; from pathlib import Path; from crma.cli.store import import_adapter
for folder in sorted(Path(sys.argv[1]).glob("lora-*")): import_adapter(folder, folder.name, Path(sys.argv[2]))
"""
Run = dict[str, float | None]
Found = dict[tuple[str, str], list[Run]]


def measured(engine: Engine, workload: Workload, seed: str) -> Run:
    """One run; the engine's memory, the machine's load average and the load generator's share of a core with it."""
    busy = time.process_time()
    answers, wall = engine.run(workload, seed)
    found = measures(answers, wall, workload.prompt_tokens) | {
        "generator_cpu": (time.process_time() - busy) / wall
    }
    errors = {answer.error for answer in answers if answer.error}
    sys.stderr.write(f"{seed}: {wall:.1f} s {', '.join(sorted(errors))}\n")
    return found | {"rss_mib": engine.rss_mib(), "load_average": os.getloadavg()[0]}


def in_turn(engines: Mapping[str, Engine], rows: Mapping[str, Workload], repetitions: int) -> Found:
    """(row, engine) -> its runs. All take their turn, `repetitions` times; a short turn before does not count."""
    found: Found = defaultdict(list)
    for i, name, engine in product(range(repetitions + 1), rows, engines):
        if {model.partition(":")[0] for model in rows[name].models} <= engines[engine].models:
            run = measured(
                engines[engine], rows[name] if i else rows[name].short(), f"{name} {engine} {i}"
            )
            found[name, engine] += [run] if i else []
    return found


def limit(workload: Workload, limits: Mapping[str, float]) -> float:
    """Tokens/s, were there nothing but the base model's weights to read and multiply: no attention, LoRA or prompt."""
    if workload.measure == "prefill_tok_s":
        return limits["prefill_tok_s"]
    return min(workload.concurrency * limits["read_tok_s"], limits["gemm_tok_s"])


def row(name: str, engine: str, measure: str, runs: Sequence[Run], **more: Any) -> dict[str, Any]:
    """Writes a row: spreads over `runs`, the failures of all of them; `limit` is in the unit of `measure`."""
    found: dict[str, Any] = {
        "row": name,
        "engine": engine,
        "measure": measure,
        "repetitions": len(runs),
    }
    found |= {key: spread([run[key] for run in runs]) for key in runs[0]}
    found |= {"failed": sum(run.get("failed") or 0 for run in runs), **more}
    if "limit" in more and found[measure]:
        found["share_of_limit"] = round(found[measure]["median"] / more["limit"], 3)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a reader."""
    lines = [
        f"{'row':<24}{'engine':<9}{'measure':<14}{'median':>9}  [min, max], TTFT p50, share of limit, failed"
    ]
    for each in rows:
        about, ttft = each[each["measure"]] or {}, each.get("ttft_p50_s") or {}
        line = f"{each['row']:<24}{each['engine']:<9}{each['measure']:<14}{about.get('median', '-'):>9}"
        more = f"{ttft.get('median', '-')}  {each.get('share_of_limit', '-')}  {each['failed']}"
        lines.append(f"{line}  [{about.get('min')}, {about.get('max')}]  {more}")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit code is 1 if a request failed."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="few requests, once: to try it, no figures to keep"
    )
    parser.add_argument(
        "--url", action="append", default=[], metavar="NAME=URL", help="one more server, that runs"
    )
    options = parser.parse_args()
    repetitions, report = 1 if options.quick else 3, []
    origin = json.loads(subprocess.check_output([sys.executable, "-c", ORIGIN]))
    model = origin.pop("model")
    origin["versions"] = {name: version(name) for name in ("torch", "transformers", "peft")}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        peer, measure_limits = stack.enter_context(peers(model, folder))
        limits = [measure_limits()]
        store = str(shutil.copytree("adapters_store", folder / "store"))
        subprocess.run(
            [sys.executable, "-c", PUBLISH, str(folder), store],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        engines = {
            name: running(url) for name, _, url in (each.partition("=") for each in options.url)
        }
        for name, settings in SERVERS.items():
            asked, starts = {"CRMA_DEVICE": "cpu", "CRMA_STORE": store, **settings}, list[Run]()
            for _ in range(repetitions + 1):
                with serving(asked, folder / "log") as (_, took):
                    starts.append({"ready_s": took})
            report.append(row("start", name, "ready_s", starts[1:], settings=settings, **origin))
            engines[name], _ = stack.enter_context(serving(asked, folder / "log"))
        engines["peft"] = peer
        rows, found = {**ROWS, **CRMA_ROWS}, Found()
        if options.quick:
            rows = {name: work.short() for name, work in rows.items()}
        for group in (
            ROWS,
            CRMA_ROWS,
        ):  # one after the other: memory is that of the eight adapters alone, at first
            found |= in_turn(engines, {name: rows[name] for name in group}, repetitions)
            limits.append(measure_limits())
        report.append(row("limits", "machine", "read_gb_s", limits, **origin))
        best = {name: max(each[name] or 0 for each in limits) for name in limits[0]}
        for (name, engine), runs in found.items():
            work, more = (
                rows[name],
                {"settings": SERVERS.get(engine), "workload": asdict(rows[name]), **origin},
            )
            if engine != "int8":  # the limit is of weights in bf16
                more["limit"] = limit(work, best)
            report.append(row(name, engine, work.measure, runs, **more))
        for (a, b), engine in product(RATIOS, engines):
            of_a, of_b = (
                [run[rows[x].measure] for run in found.get((x, engine), ())] for x in (a, b)
            )
            if of_a and of_b:
                ratios: list[Run] = [
                    {"ratio": x and y and x / y} for x, y in zip(of_a, of_b, strict=True)
                ]
                report.append(row(f"{a} / {b}", engine, "ratio", ratios, **origin))
        sys.stderr.write(table(report))
    return 1 if any(each["failed"] for each in report) else 0


if __name__ == "__main__":
    sys.exit(main())
