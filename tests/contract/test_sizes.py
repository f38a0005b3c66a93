"""The project stays small enough to be read: lines a module, a function and in all, and names that say what."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_MODULE = 400
MAX_FUNCTION = 50
TOLERANCE = 5  # a function a few lines over is not cut in two for the rule's sake
MAX_CODE = 7_860  # the aim is 6,000, and 5,000 for tests: ARCHITECTURE.md, decisions
MAX_TESTS = 5_910
SOURCE = {".py", ".cpp", ".js", ".css", ".html"}
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "manager", "managers", "base", "common", "misc"}


def sources(*tops: str) -> list[Path]:
    files = (file for top in tops for file in sorted((ROOT / top).rglob("*")))
    return [file for file in files if file.suffix in SOURCE and file.is_file() and "build" not in file.parts]


def num_lines(file: Path) -> int:
    return len(file.read_bytes().splitlines())


def num_code_lines(file: Path) -> int:
    """Lines that hold code: blank lines, comments and docstrings are what a reader is given for nothing."""
    lines = file.read_text("utf-8").splitlines()
    documented: set[int] = set()
    if file.suffix == ".py":
        for node in ast.walk(ast.parse("\n".join(lines))):
            documents = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if documents and ast.get_docstring(node, clean=False) is not None:
                documented.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    stripped = (line.strip() for number, line in enumerate(lines, start=1) if number not in documented)
    comment = "#" if file.suffix == ".py" else "//"
    return sum(1 for line in stripped if line and not line.startswith(comment))


def long_functions(source: str) -> list[tuple[str, int]]:
    """Name and length of each function over the limit: decorators and docstring do not count, inner functions do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            if length > MAX_FUNCTION + TOLERANCE:
                found.append((node.name, length))
    return found


def test_no_module_is_over_its_limit() -> None:
    files = sources("crma", "server", "clients", "tests")
    assert not {str(file.relative_to(ROOT)): num_lines(file) for file in files if num_lines(file) > MAX_MODULE}


def test_no_function_is_over_its_limit() -> None:
    files = [file for file in sources("crma", "server", "clients", "tests") if file.suffix == ".py"]
    found = {str(file.relative_to(ROOT)): long_functions(file.read_text("utf-8")) for file in files}
    assert not {name: functions for name, functions in found.items() if functions}


def test_the_whole_is_within_its_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the totals, also from a worker process, whose standard output is not shown."""
    code = {top: sum(map(num_code_lines, sources(top))) for top in ("crma", "server", "clients")}
    tests = sum(map(num_code_lines, sources("tests")))
    parts = ", ".join(f"{top} {lines:,}" for top, lines in code.items())
    total = sum(code.values())
    with capsys.disabled():
        sys.stderr.write(f"\nlines of code: {parts}: {total:,} of {MAX_CODE:,}; tests {tests:,} of {MAX_TESTS:,}\n")
    assert total <= MAX_CODE
    assert tests <= MAX_TESTS


def test_a_file_is_named_after_what_is_in_it() -> None:
    files = sources("crma", "server", "clients", "tests")
    assert not [str(file.relative_to(ROOT)) for file in files if SAYS_NOTHING & set(file.stem.lower().split("_"))]
