"""The options of the long tests."""

import pytest


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
