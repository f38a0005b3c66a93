"""`crma keys`: a key is shown once, and what it may do is in the file."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from crma.access.key import digest_of
from crma.access.key_file import KeyFile
from crma.cli.command import app
from crma.core.errors import ConfigError


def run(*arguments: str, **environment: str) -> str:
    """Stdout of the command. Raises what it raises."""
    result = CliRunner().invoke(
        app, ["keys", *arguments], env=environment, catch_exceptions=False, standalone_mode=False
    )
    return result.stdout


def test_a_key_is_printed_once_and_kept_as_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    options = ("--scopes", "generate, ablate", "--tasks", "legal,medical", "--tenant", "acme")
    limits = ("--rate", "60", "--tokens-per-min", "9000", "--concurrency", "4")
    secret = run("add", "web", "--file", str(file), *options, *limits).strip()
    (kept,) = KeyFile(file).read()
    assert kept.sha256 == digest_of(secret)
    assert secret not in file.read_text()
    assert (kept.scopes, kept.tasks, kept.tenant) == (
        ("generate", "ablate"),
        ("legal", "medical"),
        "acme",
    )
    assert (kept.limits.requests_per_minute, kept.limits.tokens_per_minute) == (60, 9000)
    assert kept.limits.max_concurrent == 4
    listed = run("ls", "--file", str(file))
    for part in ("web", "generate, ablate", "legal, medical", "acme", "requests_per_minute=60"):
        assert part in listed
    assert kept.sha256 not in listed
    shown = json.loads(run("ls", "--json", "--file", str(file)))["keys"]
    assert [each["name"] for each in shown] == ["web"]


def test_the_file_may_come_from_the_environment(tmp_path: Path) -> None:
    file = str(tmp_path / "keys.json")
    run("add", "one", CRMA_KEYS_FILE=file)
    run("add", "two", CRMA_KEYS_FILE=file)
    run("revoke", "one", CRMA_KEYS_FILE=file)
    assert run("ls", CRMA_KEYS_FILE=file).split(" ")[0] == "two"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (("--scopes", "everything"), "scopes.0"),
        (("--scopes", ","), "scopes"),
        (("--rate", "0"), "limits.requests_per_minute"),
        (("--tasks", "A"), "tasks.0"),
    ],
)
def test_a_key_that_cannot_be_is_refused_and_nothing_is_kept(
    tmp_path: Path, options: tuple[str, ...], field: str
) -> None:
    file = tmp_path / "keys.json"
    with pytest.raises(ConfigError) as caught:
        run("add", "web", "--file", str(file), *options)
    assert caught.value.field == field
    assert not file.exists()
