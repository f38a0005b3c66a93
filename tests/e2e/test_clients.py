"""Third-party clients against the real server: lm-eval and schemathesis.

lm-eval scores the server as it scores the weights with its own Hugging Face backend.

`make e2e` installs them (dependency group `e2e`). Needs `crma pull` and `crma data` first.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_keys import add
from lm_eval_scores import MODELS, check_scores
from paths import STORE
from server_process import running_server

from crma.access.scope import Scope
from crma.core.selection import Variant
from crma.evaluation.offline import Served

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore"),  # lm-eval and its datasets give many
]

SCHEMATHESIS_CONFIG = """
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]
"""
SCHEMATHESIS_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with running_server() as address:
        yield address


@pytest.mark.parametrize(("variant", "model"), MODELS)
def test_lm_eval_scores_the_server_as_it_scores_the_weights(
    variant: Variant,
    model: str,
    address: str,
    served: Served,
    lm_eval_tasks: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = check_scores(lm_eval_tasks, address, variant, model, served)
    with capsys.disabled():
        sys.stderr.write(f"\n{variant}: {found}\n")


def check_with_schemathesis(address: str, folder: Path, key: str | None = None) -> None:
    """Have schemathesis look for faults and undocumented answers.

    A 504 is not a fault: the request chooses its deadline, and may choose an absurd one.

    Args:
        folder: for its configuration.
        key: that it sends; None: none.
    """
    pytest.importorskip("schemathesis")
    (folder / "schemathesis.toml").write_text(SCHEMATHESIS_CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json"]
    command += ["--url", address]
    command += ["--checks", ",".join(SCHEMATHESIS_CHECKS)]
    command += ["--max-examples", "20"]
    command += ["--phases", "examples,fuzzing"]
    command += ["--request-timeout", "120"]
    if key is not None:
        command += ["--header", f"Authorization: {key}"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert found.returncode == 0, found.stdout[-3000:]


def test_schemathesis_finds_no_fault_and_no_undocumented_answer(
    address: str, tmp_path: Path
) -> None:
    check_with_schemathesis(address, tmp_path)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a server whose store may be changed, and scope -> a key for it."""
    folder = tmp_path_factory.mktemp("keyed")
    shutil.copytree(STORE, folder / "store", ignore=shutil.ignore_patterns(".lock"))
    file = folder / "keys.json"
    keys = {scope: add(file, f"for-{scope}", scope)["Authorization"] for scope in Scope}
    settings = {
        "CRMA_STORE": str(folder / "store"),
        "CRMA_KEYS_FILE": str(file),
        "CRMA_EVALUATIONS": str(folder / "kept"),
    }
    with running_server(**settings) as address:
        yield address, {**keys}


@pytest.mark.parametrize("scope", ["none", *Scope])
def test_schemathesis_finds_no_fault_under_any_scope(
    scope: str, keyed: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """On a server with keys, of which it sends one for the scope, or none."""
    address, keys = keyed
    check_with_schemathesis(address, tmp_path, keys.get(scope))
