"""The options of the long tests, and what several of them need."""

from pathlib import Path

import pytest
from lm_eval_scores import write_tasks
from paths import STORE

from crma.evaluation.offline import Served
from crma.models.base_model import find_base
from crma.store.adapter_store import AdapterStore


@pytest.fixture(scope="module")
def served() -> Served:
    """The shipped adapters, in float32."""
    return Served(find_base(), AdapterStore(STORE), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def lm_eval_tasks(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the definitions of lm-eval's tasks."""
    pytest.importorskip("lm_eval")
    return write_tasks(tmp_path_factory.mktemp("tasks"), served)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--churn-seconds",
        type=float,
        default=60.0,
        help="how many seconds tests/e2e/test_churn.py runs",
    )
    parser.addoption(
        "--screenshots",
        default=None,
        help="folder for a picture of each tab of the page, from tests/e2e/page; default: none",
    )
    parser.addoption(
        "--image-base",
        default=None,
        help="folder that debootstrap made, for tests/e2e/test_image.py; default: a new one",
    )
    parser.addoption(
        "--soak-minutes",
        type=float,
        default=60.0,
        help="how many minutes tests/e2e/test_soak.py runs; the server is killed every ten, and "
        "twice at least",
    )
