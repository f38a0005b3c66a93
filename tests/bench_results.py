"""The committed results of the benchmark: a file for each class of processors."""

import json
from typing import Any

from paths import BENCH_RESULTS


def bench_records(isa: str) -> list[dict[str, Any]]:
    """What `make bench` wrote on a class of processors: rows and goals."""
    lines = (BENCH_RESULTS / f"{isa}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
