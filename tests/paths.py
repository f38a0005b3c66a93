"""Folders of this repository that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
STORE = ROOT / "adapters_store"
RESULTS = ROOT / "crma" / "results"
EXPERIMENTS = ROOT / "crma" / "experiments"
BENCH = ROOT / "clients" / "bench"
BENCH_RESULTS = BENCH / "results"
