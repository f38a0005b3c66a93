"""Who may import whom, read from the source: server.routes -> server.engine -> crma, and the clients stand alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HTTP = {"fastapi", "starlette", "uvicorn", "httpx"}
TORCH = {"torch", "numpy", "transformers", "safetensors", "scipy", "peft"}
NO_TORCH = ("server.engine.request", "server.engine.scheduler", "server.engine.sequence")
READS_ENVIRONMENT = {"server.settings", "crma.cache"}


def imported(source: str, module: str, *, is_package: bool = False, types_too: bool = True) -> set[str]:
    """Dotted names that `source` imports anywhere in it, `from a import b` as both a and a.b.

    `types_too`: also under `if TYPE_CHECKING`, which never runs.
    """
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in _nodes(ast.parse(source), types_too):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names.update([origin, *(f"{origin}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):  # import_module("x"), __import__("x")
            names.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return names


def _nodes(tree: ast.AST, types_too: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not types_too and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node, types_too)


@cache
def modules() -> dict[str, Path]:
    """Module name -> file, of everything in crma/, server/ and clients/."""
    found = {}
    for top, below in (("crma", ROOT), ("server", ROOT), ("clients", ROOT), ("clients/python/crma_client", None)):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(below or ROOT / "clients/python").with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return {name: file for name, file in found.items() if not name.startswith("clients.python.")}


@cache
def imports_of(module: str, types_too: bool = True) -> frozenset[str]:
    file = modules()[module]
    is_package = file.name == "__init__.py"
    return frozenset(imported(file.read_text("utf-8"), module, is_package=is_package, types_too=types_too))


def project_imports(module: str) -> set[str]:
    """The project's modules that importing `module` runs, itself and the packages around it left out."""
    around = {".".join(module.split(".")[:depth]) for depth in range(1, module.count(".") + 2)}
    return {name for name in imports_of(module, types_too=False) if name in modules()} - around


def within(name: str, tops: set[str]) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


def breaches(where: str, banned: set[str], *, but: frozenset[str] = frozenset()) -> list[str]:
    return [
        f"{module} imports {name}"
        for module in modules()
        if within(module, {where}) and module not in but
        for name in sorted(imports_of(module))
        if within(name, banned)
    ]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.nn as nn", "torch.nn"),
        ("from server import routes", "server.routes"),
        ("from . import batch", "server.engine.batch"),
        ("from .. import routes", "server.routes"),
        ("from ..routes.generate import route", "server.routes.generate"),
        ("def lazy():\n    import torch", "torch"),
        ("import importlib\nimportlib.import_module('torch')", "torch"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", "torch"),
    ],
)
def test_an_import_is_seen_in_every_form(source: str, name: str) -> None:
    """The rules below are worth what this reader sees."""
    assert name in imported(source, "server.engine.scheduler")


def test_the_method_knows_no_http_and_no_server() -> None:
    assert not breaches("crma", {*HTTP, "prometheus_client", "server", "clients", "crma_client"})


def test_the_engine_knows_no_web_framework_and_nothing_above_it() -> None:
    above = {name for name in modules() if within(name, {"server"}) and not within(name, {"server.engine"})} - {
        "server"
    }
    assert not breaches(
        "server.engine", {*HTTP, *above, "pydantic", "pydantic_settings", "prometheus_client", "clients"}
    )


def test_only_the_app_puts_routes_together() -> None:
    inside = frozenset(name for name in modules() if within(name, {"server.routes", "server.app"}))
    assert not breaches("server", {"server.routes"}, but=inside)


def test_clients_know_neither_torch_nor_the_server() -> None:
    for client in ("clients", "crma_client"):
        assert not breaches(client, {*TORCH, "server", "crma"})


def test_the_python_client_depends_on_httpx_only() -> None:
    allowed = {*sys.stdlib_module_names, "httpx", "crma_client"}
    used = {
        name.split(".")[0] for m in modules() if within(m, {"crma_client"}) for name in imports_of(m, types_too=False)
    }
    assert used <= allowed


@pytest.mark.parametrize("module", NO_TORCH)
def test_plain_data_and_scheduling_never_reach_torch(module: str) -> None:
    """Through no chain of the project's own modules, the packages around each one included."""
    reached, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        assert not [found for found in imports_of(name, types_too=False) if within(found, TORCH)], f"by way of {name}"
        todo += [*project_imports(name), *([name.rpartition(".")[0]] if "." in name else [])]


def test_no_module_imports_itself_in_a_circle() -> None:
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(project_imports(module)):
                walk(name, (*path, module))
            done.add(module)

    for module in modules():
        walk(module, ())


def test_the_environment_is_read_in_two_places_only() -> None:
    """Settings have one owner on each side: server.settings, and crma.cache for where models and data lie."""
    readers = set()
    for module, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.environb"}:
                readers.add(module)
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                readers.update(module for alias in node.names if alias.name in {"environ", "getenv", "environb"})
        if within("pydantic_settings", set(imports_of(module))):
            readers.add(module)
    assert readers <= READS_ENVIRONMENT
