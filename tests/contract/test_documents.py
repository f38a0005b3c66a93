"""The documents are true: tables are current; named files, commands, routes and links exist."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from paths import ROOT
from tables import DOCS, TABLES, openapi, updated

from server.settings import Settings

README = ROOT / "README.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
CHANGELOG = ROOT / "CHANGELOG.md"  # may name what is gone
CURRENT = [
    README,
    ARCHITECTURE,
    ROOT / "CONTRIBUTING.md",
    ROOT / "adapters_store" / "README.md",
    ROOT / "clients" / "bench" / "README.md",
    ROOT / "clients" / "python" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:crma|server|clients|docker|docs|tests|adapters_store)/[\w./-]*)`")


def text_of(document: Path) -> str:
    return document.read_text("utf-8")


def prose(document: Path) -> str:
    """A document without its code blocks."""
    return re.sub(r"^```.*?^```", "", text_of(document), flags=re.DOTALL | re.MULTILINE)


def all_text() -> str:
    return "\n".join(map(text_of, CURRENT))


def anchors(document: Path) -> set[str]:
    """The anchors of its headings, as GitHub and the website make them."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("name", TABLES)
def test_a_generated_table_is_current(name: str) -> None:
    """Where it is not: python tests/tables.py"""
    page = text_of(TABLES[name].page)
    assert f"<!-- /{name} -->" in page
    assert updated(page, name) == page


def test_the_readme_and_the_architecture_are_short() -> None:
    assert len(text_of(README).splitlines()) <= 150
    assert len(text_of(ARCHITECTURE).splitlines()) <= 200


@pytest.mark.parametrize("document", [*CURRENT, CHANGELOG], ids=lambda path: path.name)
def test_links_resolve(document: Path) -> None:
    broken = []
    for link in LINK.findall(prose(document)):
        target, _, anchor = link.partition("#")
        generated = target == "openapi.json"
        if target.startswith("https://") or generated:
            continue
        file = (document.parent / target).resolve() if target else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    assert not broken


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    inline = re.findall(r"`make ([a-z][\w-]*)", all_text())
    in_blocks = re.findall(r"^(?:[A-Z_]+=\S+ )*make ([a-z][\w-]*)", all_text(), re.MULTILINE)
    assert {"serve", "test"} <= set(re.findall(r"^make ([\w-]+)", text_of(README), re.MULTILINE))
    assert {*inline, *in_blocks} <= targets


def test_the_tree_of_the_readme_is_there() -> None:
    tree = re.search(r"```\n(crma/.*?)```", text_of(README), re.DOTALL)
    assert tree is not None
    top = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        is_inside = line.startswith(" ")
        top = top if is_inside else name
        path = ROOT / top / name if is_inside else ROOT / name
        assert path.exists(), line


def test_files_and_folders_exist() -> None:
    named = {path for document in CURRENT for path in PATH.findall(text_of(document))}
    assert len(named) > 50
    assert not sorted(path for path in named if not (ROOT / path).exists())


def test_files_named_without_their_folder_exist() -> None:
    code = set()
    for top in ("crma", "server", "clients", "tests"):
        code |= {file.name for file in (ROOT / top).rglob("*.py")}
    assert set(re.findall(r"`(\w+\.py)`", all_text())) <= code


def test_routes_are_the_routes_of_the_app() -> None:
    served = {("GET", "/docs")}
    for path, methods in openapi()["paths"].items():
        served |= {(method.upper(), general(path)) for method in methods}
    route = re.compile(r"`(GET|POST|PUT|DELETE) (/[\w/{}]+)`")
    named = {(method, general(path)) for method, path in route.findall(all_text())}
    assert set(route.findall(text_of(DOCS / "api.md"))) >= served
    assert named == served


def test_errors_are_documented_as_the_json_that_they_are() -> None:
    for path, methods in openapi()["paths"].items():
        for method, operation in methods.items():
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert set(answer.get("content", ())) <= {"application/json"}, (path, method)


def general(path: str) -> str:
    """One path for all actions on an adapter."""
    return re.sub(r"\{task\}/\w+$", "{task}/{action}", path)


def commands() -> set[str]:
    """The names of the commands that `crma` has; of those in a group, with its name before it."""
    from crma.cli.command import app

    groups: list[tuple[str, Any]] = [("", app)]
    groups += [(f"{group.name} ", group.typer_instance) for group in app.registered_groups]
    found = set()
    for prefix, group in groups:
        for command in group.registered_commands:
            assert command.callback is not None
            found.add(prefix + (command.name or command.callback.__name__))
    return found


def test_commands_are_those_of_crma() -> None:
    table = re.findall(r"^\| `crma ([a-z ]+)` \|", text_of(DOCS / "commands.md"), re.MULTILINE)
    assert set(table) == commands()
    named = re.findall(r"(?:`|\.venv/bin/|^)crma ((?:store|keys) [a-z]+|[a-z]+)", all_text(), re.M)
    assert set(named) <= commands() | {"store", "keys"}


def test_settings_exist() -> None:
    known = {f"CRMA_{name.upper()}" for name in Settings.model_fields}
    assert set(re.findall(r"\bCRMA_[A-Z_]*[A-Z]\b", all_text())) <= known


def test_bodies_and_queries_of_curl_commands_are_accepted_by_the_schemas() -> None:
    from server.http import openai_schemas, publishing_schemas, records_schemas, schemas

    bodies: dict[str, Any] = {
        "/generate": schemas.GenerateRequest,
        "/ablation": schemas.AblationRequest,
        "/v1/completions": openai_schemas.CompletionRequest,
        "/v1/chat/completions": openai_schemas.ChatRequest,
    }
    queries: dict[str, Any] = {
        "/audit": records_schemas.AuditQuery,
        "/usage": records_schemas.UsageQuery,
    }
    joined = all_text().replace("\\\n", " ")
    curls = [shlex.split(line) for line in joined.splitlines() if line.startswith("curl ")]
    sent = set()
    for words in curls:
        address = next(word for word in words if word.startswith("127.0.0.1:8000/"))
        path, _, query = address.removeprefix("127.0.0.1:8000").partition("?")
        sent.add(path)
        if "-F" in words:
            parts = [word.partition("=") for option, word in pairwise(words) if option == "-F"]
            fields = {name: value for name, _, value in parts if not value.startswith("@")}
            publishing_schemas.UploadForm.model_validate_strings(fields)
        elif path in queries:
            given = parse_qs(query, strict_parsing=True)
            one = {name: values if name == "by" else values[0] for name, values in given.items()}
            queries[path].model_validate(one)
        else:
            bodies[path].model_validate_json(words[words.index("-d") + 1])
    assert sent == {*bodies, *queries, "/adapters"}


@pytest.mark.parametrize("page", sorted((DOCS / "decisions").glob("0*.md")), ids=lambda p: p.stem)
def test_a_decision_has_its_parts_and_is_listed(page: Path) -> None:
    headings = re.findall(r"^## (.*)$", text_of(page), re.MULTILINE)
    assert headings == ["Context", "Decision", "What was measured", "What would change it"]
    number = re.match(r"# (\d+)\. ", text_of(page))
    assert number is not None
    assert page.stem.startswith(f"{int(number[1]):04d}-")
    assert page.name in text_of(DOCS / "decisions" / "README.md")
    assert f"docs/decisions/{page.name}" in text_of(ARCHITECTURE)
    assert f"decisions/{page.name}" in text_of(ROOT / "mkdocs.yml")
