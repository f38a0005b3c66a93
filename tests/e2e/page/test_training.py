"""The tab Training: matrices and measures are those of the records."""

from collections.abc import Callable

import httpx
import pytest
from page_visit import Visit
from playwright.sync_api import expect

pytestmark = pytest.mark.e2e

Open = Callable[..., Visit]
RUN = "full/MODULAR-seed0"


def test_a_runs_matrices_are_those_of_its_record(
    visit: Open, server: str, api: httpx.Client
) -> None:
    seen = visit(f"{server}/#/training/{RUN}")
    page = seen.page
    record = api.get(f"/runs/{RUN}").json()
    expect(page.get_by_role("heading", name="MODULAR, seed 0")).to_be_visible()
    cells = page.locator(".matrix").nth(0).locator("tbody td").all_text_contents()
    assert cells == [f"{value * 100:.0f} %" for row in record["accuracy"] for value in row]
    cells = page.locator(".matrix").nth(1).locator("tbody td").all_text_contents()
    assert cells == [f"{value:.3f}" for row in record["loss"] for value in row]
    drift = page.get_by_role("group", name="Drift by task").locator("tbody tr")
    for row, nats in zip(drift.all(), record["drift_nats"], strict=True):
        shown = f"{nats:.4f}".replace("-", "\u2212").replace("\u22120.0000", "0.0000")
        assert row.locator("td").nth(1).text_content() == shown
    assert "Every doubly stochastic matrix has norm 1." in (page.text_content("main") or "")


def test_a_run_without_a_backbone_says_so(visit: Open, server: str) -> None:
    seen = visit(f"{server}/#/training")
    page = seen.page
    page.get_by_role("link", name="full/FROZEN-matched-seed0").click()
    expect(page.get_by_text("it has no norm log")).to_be_visible()
    serving = page.get_by_role("group", name="What serves").locator("tbody tr")
    expect(serving).to_have_count(5)


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_serious_and_nothing_is_too_wide(
    visit: Open, server: str, look: str
) -> None:
    seen = visit(f"{server}/#/training/{RUN}", look=look)
    expect(seen.page.get_by_role("heading", name="MODULAR, seed 0")).to_be_visible()
    expect(seen.page.get_by_role("group", name="What serves").locator("tbody tr")).to_have_count(5)
    seen.show(f"training-{look}")
    assert seen.axe() == []
    assert not seen.is_too_wide()
