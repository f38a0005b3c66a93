"""How long the churn runs."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--churn-seconds", type=float, default=60.0, help="how long tests/e2e/test_churn.py runs"
    )
