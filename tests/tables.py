"""The tables of the documents, made from the code and the records: `python tests/tables.py` writes them."""

import json
import re
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from paths import RESULTS, ROOT
from prometheus_client import CollectorRegistry, Metric

from crma.training.experiment import read_experiment
from crma.training.tables import arms_table
from server.engine.request import EngineStats
from server.service.errors import CODES
from server.service.metrics import Metrics
from server.settings import Settings

README = ROOT / "README.md"


COLUMNS = {
    "task+crma": "LoRA + CRMA",
    "task": "same LoRA, CRMA off",
    "crma": "CRMA alone",
    "base": "base",
    "control": "LoRA without CRMA",
    "naive_bayes": "naive Bayes",
}


def results_table() -> str:
    """What `crma ablate` gave on the holdout questions: accuracy with its 95 % interval."""
    result = json.loads((RESULTS / "holdout-ablation.json").read_text("utf-8"))
    variants: Mapping[str, Any] = result["variants"]
    rows = {
        task: [variants[column]["by_task"][task] for column in COLUMNS]
        for task in variants["task"]["by_task"]
    }
    rows["**all**"] = [variants[column] for column in COLUMNS]
    made, machine = result["provenance"], result["provenance"]["hardware"]
    lines = [f"| {' | '.join(['holdout', *COLUMNS.values()])} |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {task} | {' | '.join(map(_cell, cells))} |" for task, cells in rows.items()]
    origin = (
        f"Exact-match accuracy on {result['question_set']['items']} questions [95 %, Wilson]: SmolLM2-135M-Instruct, "
        f"{made['dtype']}, greedy; one run of training; {machine['cores']} cores of {machine['cpu']}; commit "
        f"`{made['commit']}`."
    )
    return "\n".join([*lines, "", origin])


def _cell(cell: Mapping[str, Any]) -> str:
    low, high = cell["wilson"]
    return f"{cell['accuracy']:.2f} [{low:.2f}, {high:.2f}]"


def settings_table() -> str:
    lines = ["| variable | default | |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = (
            str(default).lower()
            if isinstance(default, bool)
            else ""
            if default is None
            else str(default)
        )
        lines.append(f"| `CRMA_{name.upper()}` | `{shown}` | {field.description} |")
    return "\n".join(lines)


def errors_table() -> str:
    by_status: dict[int, list[str]] = {}
    for status, code in CODES:
        by_status.setdefault(status, []).append(f"`{code}`")
    return "\n".join(
        [
            "| status | code |",
            "|---|---|",
            *(f"| {s} | {', '.join(c)} |" for s, c in by_status.items()),
        ]
    )


def metric_families() -> list[Metric]:
    metrics = Metrics(CollectorRegistry())
    metrics.watch(EngineStats, dict, 1)
    return list(metrics.registry.collect())


def metrics_table() -> str:
    families = [(f"{f.name}{'_total' * (f.type == 'counter')}", f) for f in metric_families()]
    lines = {f"| `{name}` | {f.type} | {f.documentation} |" for name, f in families}
    return "\n".join(["| name | type | |", "|---|---|---|", *sorted(lines)])


def arms(name: str) -> str:
    planned = read_experiment(ROOT / "crma" / "experiments" / f"{name}.toml").planned()
    files = {run: RESULTS / name / f"{run}.json" for run in planned}
    return arms_table(
        {run: json.loads(file.read_text("utf-8")) for run, file in files.items() if file.exists()}
    )


ENGINES = {"server": "CRMA Server", "int8": "the same, int8", "peft": "transformers, PEFT"}


BENCH = {
    "mixed": "8 LoRAs in turn, 16 requests at once, tokens/s",
    "base": "no LoRA, 16 at once, tokens/s",
    "single": "one stream, tokens/s",
    "prefill": "a prompt of 512 tokens, tokens/s",
    "prefill-lora": "the same with a LoRA, tokens/s",
    "crma-off": "5 shipped tasks, 16 at once, CRMA off, tokens/s",
    "crma-half": "CRMA on for every second, tokens/s",
    "crma-on": "CRMA on for all, tokens/s",
}


def bench_table() -> str:
    """What `make bench` gave: medians, the range of the repetitions, and the median time to the first token."""
    lines = (ROOT / "clients" / "bench" / "results.jsonl").read_text("utf-8").splitlines()
    rows = {(row["row"], row["engine"]): row for row in map(json.loads, lines)}

    def cell(name: str, engine: str, key: str = "", digits: int = 0) -> str:
        if (row := rows.get((name, engine))) is None or not (
            found := row.get(key or row["measure"])
        ):
            return "–"
        ttft = (
            f", TTFT {row['ttft_p50_s']['median']:.2f} s"
            if name in ("mixed", "base") and not key
            else ""
        )
        return f"{found['median']:.{digits}f} [{found['min']:.{digits}f}, {found['max']:.{digits}f}]{ttft}"

    table = [f"| {' | '.join(['', *ENGINES.values()])} |", "|---" * (len(ENGINES) + 1) + "|"]
    table += [
        f"| {label} | {' | '.join(cell(name, e) for e in ENGINES)} |"
        for name, label in BENCH.items()
    ]
    table.append(
        f"| memory after `mixed`, MiB | {' | '.join(cell('mixed', e, 'rss_mib') for e in ENGINES)} |"
    )
    table.append(
        f"| start to ready, second time, s | {' | '.join(cell('start', e, digits=1) for e in ENGINES)} |"
    )
    limits = rows["limits", "machine"]
    machine, read = limits["hardware"], limits["read_gb_s"]["median"]
    origin = f"{machine['cores']} cores of {machine['cpu']}, which read {read:.0f} GB/s; commit `{limits['commit']}`."
    return "\n".join(
        [
            *table,
            "",
            f"`make bench`: medians [lowest, highest] of {rows['mixed', 'server']['repetitions']}; {origin}",
        ]
    )


BLOCKS = {
    "bench": bench_table,
    "settings": settings_table,
    "errors": errors_table,
    "metrics": metrics_table,
    "results": results_table,
}
BLOCKS |= {name: partial(arms, name) for name in ("quick", "full")}


def block(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}\b[^>]*-->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


if __name__ == "__main__":
    text = README.read_text("utf-8")
    for name, render in BLOCKS.items():
        text = block(name).sub(lambda m, r=render: f"{m[1]}{r()}\n{m[3]}", text)
    README.write_text(text, "utf-8")
    sys.exit(0)
