"""The documents are true: their tables are what the code says, their files exist, their commands are the Makefile's."""

import re
import shlex
from pathlib import Path

from tables import README, ROOT


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([\w-]+)", README.read_text("utf-8")))
    assert {"serve", "test"} <= named <= targets


def test_files_and_folders_of_the_readme_exist() -> None:
    text = README.read_text("utf-8")
    tree = re.search(r"```\n(crma/.*?)```", text, re.DOTALL)
    assert tree is not None
    top = ""
    for line in tree[1].splitlines():
        name = line.split()[0]
        top = top if line.startswith(" ") else name
        assert (ROOT / (Path(top) / name if line.startswith(" ") else Path(name))).exists(), line
    text += (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    for path in re.findall(r"`((?:crma|server|clients|docker|adapters_store)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    code = {
        file.name for top in ("crma", "server", "clients") for file in (ROOT / top).rglob("*.py")
    }
    assert set(re.findall(r"`(\w+\.py)`", text)) <= code


def test_routes_of_the_readme_are_the_routes_of_the_app() -> None:
    from server.http.routes import ablation, adapters, generate, openai, operations

    routers = (
        generate.router,
        openai.router,
        ablation.router,
        adapters.router,
        adapters.admin,
        operations.router,
    )
    served = {route.path for router in routers for route in router.routes}  # type: ignore[attr-defined]
    served = {re.sub(r"\{task\}/\w+$", "{task}/{action}", path) for path in served}
    named = set(re.findall(r"`(?:GET|POST|PUT) (/[\w/{}]+)`", README.read_text("utf-8")))
    assert named == served | {"/docs"}


def test_crma_commands_of_the_readme_are_those_of_the_command() -> None:
    from crma.cli.command import app

    named = set(re.findall(r"^\| `crma (\w+)` \|", README.read_text("utf-8"), re.MULTILINE))
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert named == commands


def test_bodies_of_the_readmes_curls_are_accepted_by_the_schemas() -> None:
    from server.http.schemas import AblationRequest, CompletionRequest, GenerateRequest

    schemas = {
        "/generate": GenerateRequest,
        "/ablation": AblationRequest,
        "/v1/completions": CompletionRequest,
    }
    text = README.read_text("utf-8").replace("\\\n", " ")
    curls = [shlex.split(line) for line in text.splitlines() if line.startswith("curl ")]
    assert len(curls) >= 2
    for words in curls:
        path = next(word for word in words if "/" in word and word[:4] == "127.").split("8000")[1]
        schemas[path].model_validate_json(words[words.index("-d") + 1])
