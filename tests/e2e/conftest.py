"""The option that sets the length of the churn test."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--churn-seconds",
        type=float,
        default=60.0,
        help="how many seconds tests/e2e/test_churn.py runs",
    )
