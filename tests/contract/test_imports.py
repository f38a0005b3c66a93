"""Who may import whom, read from the source: server.routes -> server.engine -> crma, and the clients stand alone."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HTTP = {"fastapi", "starlette", "uvicorn", "httpx"}
TORCH = {"torch", "numpy", "transformers", "safetensors", "scipy", "peft"}
NO_TORCH = ", ".join(f"server.engine.{name}" for name in ("block_pool", "request", "scheduler", "sequence"))
READS_ENVIRONMENT = {"server.settings", "crma.cache", "server"}  # the last: what OpenMP finds there


def imported(source: str) -> set[str]:
    """Dotted names that `source` imports anywhere in it, `from a import b` as both a and a.b; none is relative."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, ast.unparse(node)
            names.update([str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # import_module("x"), __import__("x")
            names.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return names


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, of everything in crma/, server/ and clients/."""
    found = {}
    for top, below in (
        ("crma", "."),
        ("server", "."),
        ("clients/python/crma_client", "clients/python"),
        ("clients/bench", "clients"),
    ):
        for file in sorted((ROOT / top).rglob("*.py")):
            name = ".".join(file.relative_to(ROOT / below).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = file
    return found


@cache
def imports_of(module: str) -> frozenset[str]:
    return frozenset(imported(modules()[module].read_text("utf-8")))


def within(name: str, tops: set[str]) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


ABOVE_ENGINE = {m for m in modules() if within(m, {"server"}) and not within(m, {"server.engine"})} - {"server"}


BANNED = {  # where: what
    "crma": {*HTTP, "prometheus_client", "server", "clients", "crma_client"},
    "server.engine": {*HTTP, *ABOVE_ENGINE, "pydantic", "prometheus_client", "clients"},
    "server": {"server.routes"},  # but the routes themselves and the app
    "crma_client": {*TORCH, "server", "crma"},
    "bench": {"server", "crma", "crma_client"},
}


@pytest.mark.parametrize("where", BANNED)
def test_nobody_imports_what_is_above_it(where: str) -> None:
    banned, but = BANNED[where], {"server.routes", "server.app"} if where == "server" else set()
    found = {m: imports_of(m) for m in modules() if within(m, {where}) and not within(m, but)}
    assert found
    assert not [f"{m} imports {name}" for m, names in found.items() for name in names if within(name, banned)]


def test_the_python_client_depends_on_httpx_only() -> None:
    allowed = {*sys.stdlib_module_names, "httpx", "crma_client", "typing_extensions"}  # the last for types only
    used = {name.split(".")[0] for m in modules() if within(m, {"crma_client"}) for name in imports_of(m)}
    assert "httpx" in used, "the reader of imports sees nothing"
    assert used <= allowed


def test_of_the_benchmark_only_the_peers_import_torch() -> None:
    """The peers run in a process of their own: the load generator shares the cores with what it measures."""
    found = {m for m in modules() if within(m, {"bench"}) and any(within(name, TORCH) for name in imports_of(m))}
    assert found == {"bench.peers"}


def test_plain_data_and_scheduling_never_reach_torch() -> None:
    code = f"import sys, {NO_TORCH}; sys.exit(not {TORCH}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_environment_is_read_in_two_places_only() -> None:
    """Settings have one owner on each side: server.settings, and crma.cache for where models and data lie."""
    reads = re.compile(r"\benviron\b|\bgetenvb?\b|^(?:import|from) pydantic_settings", re.MULTILINE)
    assert {m for m, file in modules().items() if reads.search(file.read_text("utf-8"))} == READS_ENVIRONMENT
