"""The parts of the documents that come from the code and the records.

`python tests/tables.py` writes the tables. A table stands between `<!-- name … -->` and
`<!-- /name -->` in the page that `TABLES` gives for it.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench_results import bench_records
from cost_model import BASE_COLUMNS, SLOT_COLUMNS, base_rows, slot_rows
from fastapi import APIRouter, FastAPI
from paths import EXPERIMENTS, RESULTS, ROOT
from prometheus_client import CollectorRegistry, Metric
from replicas import remote_engine
from route_rules import SCOPES
from route_rules import rows as route_rows
from scripted_engine import ScriptedEngine

from crma.core.allowed import describe
from crma.training.config import CrmaSettings, LoraSettings, TrainConfig
from crma.training.experiment import read_experiment
from crma.training.study import read_study
from crma.training.study_report import study_report
from crma.training.tables import arms_table
from server import __version__
from server.engine.request import EngineStats
from server.http import routes
from server.ray.replica_metrics import ReplicaMetrics
from server.service.engine_metrics import EngineMetrics
from server.service.errors import CODES
from server.service.metrics import Metrics
from server.service.vllm_metrics import VllmMetrics
from server.settings import Settings

DOCS = ROOT / "docs"

# Columns of the results table: variant of the ablation -> heading.
COLUMNS = {
    "task+crma": "LoRA + CRMA",
    "task": "same LoRA, CRMA off",
    "crma": "CRMA alone",
    "base": "base",
    "control": "LoRA without CRMA",
    "naive_bayes": "naive Bayes",
}

# Columns of the benchmark table: engine of the rows -> heading.
ENGINES = {
    "server": "CRMA Server",
    "int8": "CRMA Server, int8",
    "peft": "transformers, PEFT",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp, F16",
    "llama.cpp-bf16": "llama.cpp, BF16",
    "llama.cpp-int8": "llama.cpp, Q8_0",
}

# Rows of the benchmark table: row of the records -> label.
BENCH_ROWS = {
    "mixed": "8 LoRAs in turn, 16 requests at once, tokens/s",
    "base": "no LoRA, 16 requests at once, tokens/s",
    "single": "one stream, tokens/s",
    "prefill": "a prompt of 512 tokens, tokens/s",
    "prefill-lora": "the same with a LoRA, tokens/s",
    "crma-off": "5 shipped tasks, 16 requests at once, CRMA off, tokens/s",
    "crma-half": "the same, CRMA on for every second request, tokens/s",
    "crma-on": "the same, CRMA on for all, tokens/s",
    "random-length": "8 LoRAs, random lengths, tokens/s",
    "poisson": "8 LoRAs, random arrivals at 70 % of the throughput: TTFT p95, s",
    "long": "one stream after 1,936 tokens, tokens/s",
    "churn-none": "8 new tokens a request, no LoRA, tokens/s",
    "churn-8": "the same, 8 LoRAs, tokens/s",
    "churn-64": "the same, 64 LoRAs, tokens/s",
}
BENCH_DIGITS = {"poisson": 2}
ROWS_WITH_TTFT = ("mixed", "base")
NOT_MEASURED = "–"


def results_table() -> str:
    """Holdout accuracy from `crma ablate`, with its 95 % Wilson interval."""
    result = json.loads((RESULTS / "holdout-ablation.json").read_text("utf-8"))
    variants: Mapping[str, Any] = result["variants"]
    rows = {}
    for task in variants["task"]["by_task"]:
        rows[task] = [variants[column]["by_task"][task] for column in COLUMNS]
    rows["**all**"] = [variants[column] for column in COLUMNS]
    lines = markdown_table(
        ["holdout", *COLUMNS.values()],
        [[task, *map(_accuracy, cells)] for task, cells in rows.items()],
    )
    made = result["provenance"]
    machine = made["hardware"]
    origin = (
        f"Exact-match accuracy on {result['question_set']['items']} questions [95 %, Wilson]. "
        f"SmolLM2-135M-Instruct, {made['dtype']}, greedy decoding, one training run; "
        f"{machine['cores']} cores of {machine['cpu']}; commit `{made['commit']}`."
    )
    return "\n".join([*lines, "", origin])


def _accuracy(cell: Mapping[str, Any]) -> str:
    low, high = cell["wilson"]
    return f"{cell['accuracy']:.2f} [{low:.2f}, {high:.2f}]"


def settings_table() -> str:
    """Every setting with its default and its description."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = _default(field.default)
        rows.append([f"`CRMA_{name.upper()}`", default, str(field.description)])
    return "\n".join(markdown_table(["variable", "default", "meaning"], rows))


def _default(value: object) -> str:
    """A default as it would be written in the environment; empty where unset."""
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def config_table() -> str:
    """Every key of a training config, table by table: its default, what it takes, its meaning."""
    parts = []
    for table, model in (("", TrainConfig), ("lora", LoraSettings), ("crma", CrmaSettings)):
        schema = model.model_json_schema()["properties"]
        rows = []
        for name, field in model.model_fields.items():
            if field.description is None:  # a table of its own
                continue
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            allowed = describe(schema[name]).replace("|", "\\|")
            rows.append([f"`{name}`", default, allowed, field.description])
        title = f"`[{table}]`" if table else "key"
        parts += [*markdown_table([title, "default", "allowed", "meaning"], rows), ""]
    return "\n".join(parts[:-1])


def errors_table() -> str:
    """Every status with the codes that it can have."""
    by_status: dict[int, list[str]] = {}
    for status, code in CODES:
        by_status.setdefault(status, []).append(f"`{code}`")
    rows = [[str(status), ", ".join(codes)] for status, codes in by_status.items()]
    return "\n".join(markdown_table(["status", "code"], rows))


def metric_families() -> list[Metric]:
    """Every metric that `GET /metrics` can have."""
    metrics = Metrics(CollectorRegistry())
    engine = EngineMetrics(metrics, EngineStats, dict, dict, 1)
    vllm = VllmMetrics(metrics, EngineStats, "model")
    return [*metrics.registry.collect(), *engine.collect(), *vllm.collect()]


def replica_metric_families() -> list[Metric]:
    """Every metric that a server on replicas has besides."""
    engine, _ = remote_engine([ScriptedEngine()])
    return list(ReplicaMetrics(engine).collect())


def metrics_table(families: Callable[[], list[Metric]]) -> str:
    """Every metric with its type and help text, by name."""
    rows = set()
    for family in families():
        suffix = "_total" if family.type == "counter" else ""
        rows.add((f"`{family.name}{suffix}`", family.type, family.documentation))
    return "\n".join(markdown_table(["name", "type", "meaning"], sorted(rows)))


def access_table() -> str:
    """Every route, what a key with each scope gets, and whether it counts against limits."""
    return "\n".join(markdown_table(["route", "no key", *SCOPES, "counts"], route_rows()))


def experiment_table(name: str) -> str:
    """The arms of an experiment, from those of its runs whose record is there."""
    records = {}
    for run in read_experiment(EXPERIMENTS / f"{name}.toml").planned():
        file = RESULTS / name / f"{run}.json"
        if file.exists():
            records[run] = json.loads(file.read_text("utf-8"))
    return arms_table(records)


def sharing_table() -> str:
    """The phases of the study that have records."""
    return study_report(read_study(EXPERIMENTS / "sharing.toml"), RESULTS)


def bench_table(isa: str) -> str:
    """What `make bench` measured: medians, ranges of the repetitions, and the median TTFT."""
    records = bench_records(isa)
    rows = {(row["row"], row["engine"]): row for row in records if "row" in row}
    measured = {name for name, _ in rows}
    engines = [engine for engine in ENGINES if ("base", engine) in rows]

    def line(label: str, name: str, key: str = "", digits: int = 0) -> list[str]:
        cells = [_figure(rows.get((name, engine)), key, digits) for engine in engines]
        return [label, *cells]

    table = [
        line(label, name, digits=BENCH_DIGITS.get(name, 0))
        for name, label in BENCH_ROWS.items()
        if name in measured
    ]
    table.append(line("memory after `mixed`, MiB", "mixed", key="rss_mib"))
    table.append(line("start to ready, second time, s", "start", digits=1))
    limits = rows["limits", "machine"]
    machine = limits["hardware"]
    mixed = rows["mixed", "server"]
    load = mixed["workload"]
    origin = (
        f"`make bench`: {load['num_requests']} requests, {load['prompt_tokens']} tokens in and "
        f"{load['new_tokens']} out; medians [lowest, highest] of {mixed['repetitions']}; "
        f"{machine['cores']} cores of {machine['cpu']}, which read "
        f"{limits['read_gb_s']['median']:.0f} GB/s; commit `{limits['commit']}`."
    )
    header = ["", *(ENGINES[engine] for engine in engines)]
    return "\n".join([*markdown_table(header, table), "", origin])


def goals_table(isa: str) -> str:
    """What `make bench` found of each goal."""
    answers = {None: NOT_MEASURED, "no": "no", "must": "must", "aim": "must and aim"}
    known: dict[str, Any] = {}
    for row in bench_records(isa):
        if "goal" in row and (row["found"] is not None or row["goal"] not in known):
            known[row["goal"]] = row
    table = []
    for goal, row in known.items():
        found = NOT_MEASURED if row["found"] is None else f"{row['found']['median']:.2f}"
        must, aim = f"{row['must']:.2f}", f"{row['aim']:.2f}"
        table.append([goal, must, aim, found, answers[row["reached"]]])
    if not table:
        return "These results are from before the goals."
    return "\n".join(markdown_table(["goal", "must", "aim", "found", "reached"], table))


def cost_table() -> str:
    """What a step and an adapter cost on each base model."""
    return "\n".join(markdown_table([*BASE_COLUMNS], base_rows()))


def slots_table() -> str:
    """Slots and replicas for each base model and number of tasks."""
    return "\n".join(markdown_table([*SLOT_COLUMNS], slot_rows()))


def _figure(row: Mapping[str, Any] | None, key: str, digits: int) -> str:
    """One figure of a benchmark row: `key`, or the figure that the row is about."""
    figure = None if row is None else row.get(key or row["measure"])
    if row is None or figure is None:
        return NOT_MEASURED
    median, low, high = (f"{figure[part]:.{digits}f}" for part in ("median", "min", "max"))
    text = f"{median} [{low}, {high}]"
    if row["row"] in ROWS_WITH_TTFT and not key:
        text += f", TTFT {row['ttft_p50_s']['median']:.2f} s"
    return text


def markdown_table(header: list[str], rows: list[Any]) -> list[str]:
    """The lines of a Markdown table."""
    ruler = "|---" * len(header) + "|"
    return [f"| {' | '.join(header)} |", ruler, *(f"| {' | '.join(row)} |" for row in rows)]


def openapi() -> dict[str, Any]:
    """The OpenAPI document of every route in `server/http/routes/`, without a running server."""
    app = FastAPI(title="CRMA Server", version=__version__)
    for module in iter_modules(routes.__path__, f"{routes.__name__}."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, APIRouter):
                app.include_router(value)
    return app.openapi()


class Table(NamedTuple):
    """A generated table: the page that shows it, and how it is made."""

    page: Path
    render: Callable[[], str]


TABLES = {
    "cost": Table(DOCS / "cost.md", cost_table),
    "slots": Table(DOCS / "cost.md", slots_table),
    "settings": Table(DOCS / "settings.md", settings_table),
    "errors": Table(DOCS / "api.md", errors_table),
    "metrics": Table(DOCS / "operations.md", partial(metrics_table, metric_families)),
    "replica-metrics": Table(DOCS / "replicas.md", partial(metrics_table, replica_metric_families)),
    "access": Table(DOCS / "operations.md", access_table),
    "config": Table(DOCS / "training.md", config_table),
    "results": Table(DOCS / "results.md", results_table),
    "sharing": Table(DOCS / "results.md", sharing_table),
    "quick": Table(DOCS / "results.md", partial(experiment_table, "quick")),
    "full": Table(DOCS / "results.md", partial(experiment_table, "full")),
    "bench-amx": Table(DOCS / "benchmark.md", partial(bench_table, "amx")),
    "bench-avx2": Table(DOCS / "benchmark.md", partial(bench_table, "avx2")),
    "bench-avx512bf16": Table(DOCS / "benchmark.md", partial(bench_table, "avx512bf16")),
    "goals-avx2": Table(DOCS / "benchmark.md", partial(goals_table, "avx2")),
    "goals-avx512bf16": Table(DOCS / "benchmark.md", partial(goals_table, "avx512bf16")),
}


def block(name: str) -> re.Pattern[str]:
    """Matches a table and its two marks: (opening mark, table, closing mark)."""
    return re.compile(rf"(<!-- {name}\b[^>]*-->\n)(.*?)(<!-- /{name} -->)", re.DOTALL)


def updated(page: str, name: str) -> str:
    """The text of a page with one of its tables made anew."""
    table = f"{TABLES[name].render()}\n"
    return block(name).sub(lambda found: found[1] + table + found[3], page)


if __name__ == "__main__":
    for name, table in TABLES.items():
        table.page.write_text(updated(table.page.read_text("utf-8"), name), "utf-8")
