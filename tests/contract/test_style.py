"""Rules that keep the code readable: short modules and functions, plain lines, clear file names."""

import ast
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 50
TOLERANCE = 5  # a function that is a few lines longer need not be split for the rule's sake
TOPS = ("crma", "server", "clients", "tests")
SOURCE_SUFFIXES = {".py", ".cpp", ".h", ".js", ".css", ".html"}
MEANINGLESS = {"utils", "util", "helpers", "helper", "manager", "managers", "common", "misc"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def sources(*tops: str) -> list[Path]:
    files = (file for top in tops for file in sorted((ROOT / top).rglob("*")))
    foreign = {"build", "vendor"}  # made, or other people's as they published it
    return [
        file for file in files if file.suffix in SOURCE_SUFFIXES and foreign.isdisjoint(file.parts)
    ]


def python_sources(*tops: str) -> list[Path]:
    return [file for file in sources(*tops) if file.suffix == ".py"]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def num_lines(file: Path) -> int:
    return len(file.read_bytes().splitlines())


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines without decorators and docstring; inner functions count."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - ((docstring.end_lineno or 0) - docstring.lineno + 1)


def inside(node: ast.AST, kinds: type | tuple[type, ...]) -> Iterator[ast.AST]:
    """Nodes of the given kinds below `node`, without `node` itself."""
    return (child for child in ast.walk(node) if child is not node and isinstance(child, kinds))


def arguments_or_slice(node: ast.AST) -> list[ast.expr]:
    """The arguments of a call, or the slice of a subscript."""
    if isinstance(node, ast.Call):
        return [*node.args, *(keyword.value for keyword in node.keywords)]
    if isinstance(node, ast.Subscript):
        return [node.slice]
    return []


def dense_lines(tree: ast.AST) -> Iterator[int]:
    """Lines with an assignment inside arguments or a slice, or with nested comprehensions."""
    for node in ast.walk(tree):
        for part in arguments_or_slice(node):
            for found in ast.walk(part):
                if isinstance(found, ast.NamedExpr):
                    yield found.lineno
        if isinstance(node, COMPREHENSIONS) and any(inside(node, COMPREHENSIONS)):
            yield node.lineno


def test_no_module_is_over_its_limit() -> None:
    lines = {name_of(file): num_lines(file) for file in sources(*TOPS)}
    assert not {name: number for name, number in lines.items() if number > MAX_MODULE_LINES}


def test_no_function_is_over_its_limit() -> None:
    found = []
    for file in python_sources(*TOPS):
        for function in inside(ast.parse(file.read_text("utf-8")), FUNCTIONS):
            lines = length(function)
            if lines > MAX_FUNCTION_LINES + TOLERANCE:
                found.append(f"{name_of(file)}: {function.name}, {lines}")
    assert not found


def test_no_line_is_dense() -> None:
    """No assignment expression inside arguments or slices, no comprehension inside another."""
    found = {}
    for file in python_sources("crma", "server", "clients"):
        lines = sorted(set(dense_lines(ast.parse(file.read_text("utf-8")))))
        if lines:
            found[name_of(file)] = lines
    assert not found


def test_file_names_say_what_the_file_holds() -> None:
    found = []
    for file in sources(*TOPS):
        words = set(file.stem.lower().split("_"))
        if words & MEANINGLESS:
            found.append(name_of(file))
    assert not found
