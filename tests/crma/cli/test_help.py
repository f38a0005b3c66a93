"""`--help` of every command: fast, says what comes next, and names the options that all have."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from paths import ROOT
from typer.testing import CliRunner

from crma.cli.command import app
from crma.cli.evaluation import SCORERS as NAMED
from crma.evaluation.scorers import SCORERS

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "scipy",
    "matplotlib",
    "rich",
    "httpx",
)  # pydantic: typer
GROUPS = {str(group.name): group.typer_instance for group in app.registered_groups}


def named(group: Any) -> Iterator[str]:
    for command in group.registered_commands:
        yield command.name or command.callback.__name__


COMMANDS = [(name,) for name in named(app)]
for group_name, members in GROUPS.items():
    COMMANDS += [(group_name, name) for name in named(members)]


def shown(*arguments: str) -> str:
    """The help, in lines as wide as they come."""
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    return result.stdout


def test_help_loads_no_heavy_package() -> None:
    """Of the command and of every subcommand: otherwise each would take seconds."""
    script = f"""
import sys
from crma.cli.command import app
for arguments in [[], *{[list(words) for words in COMMANDS]}]:
    app([*arguments, "--help"], standalone_mode=False)
print([name for name in {HEAVY} if name in sys.modules])
"""
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert finished.stdout.count("Usage: ") == 1 + len(COMMANDS) > 20
    assert finished.stdout.splitlines()[-1] == "[]"


def test_the_first_line_says_what_to_do_next() -> None:
    for group in ((), ("store",), ("keys",)):
        lines = [line.strip() for line in shown(*group).splitlines() if line.strip()]
        assert lines[0].startswith("Usage: ")
        assert lines[1].startswith(("Start here: `crma ", "Next: `crma "))


@pytest.mark.parametrize("group", [(), ("store",), ("keys",)])
def test_a_list_of_commands_has_whole_sentences(group: tuple[str, ...]) -> None:
    """On a terminal of 80 columns. Half of them ended in three dots."""
    result = CliRunner().invoke(app, [*group, "--help"], env={"COLUMNS": "80"})
    lines = result.stdout.partition("Commands:")[2].split("\n")
    listed = [line for line in lines if line.strip()]
    assert len(listed) > 2
    assert [line for line in listed if line.endswith("...")] == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_can_print_json_and_be_quiet(words: tuple[str, ...]) -> None:
    text = shown(*words)
    assert "--json" in text
    assert "-q, --quiet" in text


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_store_a_model_and_a_server_are_options_everywhere(words: tuple[str, ...]) -> None:
    text = shown(*words)
    arguments = text.partition("Arguments:")[2].partition("Options:")[0]
    assert not any(f" {name} <" in arguments for name in ("store", "model", "server"))
    if words[0] == "store":
        assert "--store STORE" in text


def test_the_help_names_every_scorer() -> None:
    assert tuple(NAMED.split(", ")) == tuple(SCORERS)


def completed(line: str) -> list[str]:
    """What bash offers after a line."""
    environment = {"_CRMA_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(line.split(" ")) - 1)
    script = "import sys; sys.argv[0] = 'crma'; from crma.cli.command import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return finished.stdout.split()


def test_a_shell_completes_commands_and_options() -> None:
    assert completed("crma ge") == ["generate"]
    assert completed("crma store ro") == ["rollback"]
    assert set(completed("crma ablate --st")) == {"--store", "--strengths"}


def test_colours_are_left_out_where_they_are_not_wanted() -> None:
    script = "from crma.cli.output import note; note('hello', style='red')"
    for settings, has_colour in (({}, True), ({"NO_COLOR": "1"}, False)):
        environment = {**os.environ, "FORCE_COLOR": "1", **settings}
        finished = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("\x1b[31m" in finished.stderr) == has_colour
        assert finished.stdout == ""


def test_the_environment_is_json_with_what_a_bug_report_needs() -> None:
    result = CliRunner().invoke(app, ["env", "--json"], env={"CRMA_API_KEYS": "secret"})
    found = json.loads(result.stdout)
    assert found["packages"]["torch"]
    assert found["hardware"]["cores"] > 0
    assert "CRMA_API_KEYS" in found["settings"]
    assert "secret" not in result.stdout
