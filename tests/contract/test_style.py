"""What keeps the code readable: short modules and functions, one thought a line, files named after a noun."""

import ast
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

MAX_MODULE = 400
MAX_FUNCTION = 50
TOLERANCE = 5  # a function a few lines over is not cut in two for the rule's sake
SOURCE = {".py", ".cpp", ".js", ".css", ".html"}
SAYS_NOTHING = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def sources(*tops: str) -> list[Path]:
    files = (file for top in tops for file in sorted((ROOT / top).rglob("*")))
    return [file for file in files if file.suffix in SOURCE and "build" not in file.parts]


def num_lines(file: Path) -> int:
    return len(file.read_bytes().splitlines())


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from the name on: decorators and the docstring do not count, inner functions do."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def inside(node: ast.AST, kinds: type | tuple[type, ...]) -> Iterator[ast.AST]:
    """Nodes of some kinds below a node, itself not among them."""
    return (child for child in ast.walk(node) if child is not node and isinstance(child, kinds))


def dense_lines(tree: ast.AST) -> Iterator[int]:
    """Lines with an assignment inside arguments or a slice, or a comprehension inside another."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts = [*node.args, *(keyword.value for keyword in node.keywords)]
        else:
            parts = [node.slice] if isinstance(node, ast.Subscript) else []
        assigned = [found for part in parts for found in ast.walk(part)]
        yield from (found.lineno for found in assigned if isinstance(found, ast.NamedExpr))
        if isinstance(node, COMPREHENSIONS) and any(inside(node, COMPREHENSIONS)):
            yield node.lineno


def python_files() -> list[Path]:
    return [file for file in sources("crma", "server", "clients") if file.suffix == ".py"]


def test_no_module_is_over_its_limit() -> None:
    files = sources("crma", "server", "clients", "tests")
    long = {str(file.relative_to(ROOT)): num_lines(file) for file in files}
    assert not {name: lines for name, lines in long.items() if lines > MAX_MODULE}


def test_no_function_is_over_its_limit() -> None:
    found = []
    for file in sources("crma", "server", "clients", "tests"):
        if file.suffix == ".py":
            functions = inside(ast.parse(file.read_text("utf-8")), FUNCTIONS)
            long = [each for each in functions if length(each) > MAX_FUNCTION + TOLERANCE]
            found += [f"{file.relative_to(ROOT)}: {each.name}, {length(each)}" for each in long]
    assert not found


def test_a_line_holds_one_thought() -> None:
    """No assignment expression inside arguments or slices, no comprehension inside another."""
    found = {}
    for file in python_files():
        lines = sorted(set(dense_lines(ast.parse(file.read_text("utf-8")))))
        if lines:
            found[str(file.relative_to(ROOT))] = lines
    assert not found


def test_a_file_is_named_after_what_is_in_it() -> None:
    files = sources("crma", "server", "clients", "tests")
    assert not [
        str(file.relative_to(ROOT))
        for file in files
        if SAYS_NOTHING & set(file.stem.lower().split("_"))
    ]
