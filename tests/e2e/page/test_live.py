"""The tab Live: its figures are those of /metrics, and they follow what the server does."""

import re
from collections.abc import Callable

import httpx
import pytest
from page_visit import Visit
from playwright.sync_api import expect
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.e2e

Open = Callable[..., Visit]


def resident(api: httpx.Client) -> dict[str, float]:
    families = text_string_to_metric_families(api.get("/metrics").text)
    samples = next(each for each in families if each.name == "crma_adapter_resident").samples
    return {sample.labels["adapter"]: sample.value for sample in samples}


def test_figures_follow_the_metrics(visit: Open, server: str, api: httpx.Client) -> None:
    seen = visit(f"{server}/#/live")
    page = seen.page
    expect(page.locator("[data-series=running]")).to_have_text("0")
    api.post(
        "/generate", json={"prompt": "Hi", "task": "legal", "max_tokens": 8}
    ).raise_for_status()
    expect(page.locator("[data-series=ttft]")).to_have_text(re.compile(r"\d (ms|s)$"))
    expect(page.locator("canvas")).to_have_count(5)
    for name, versions in resident(api).items():
        told = "in memory" if versions else "not loaded"
        expect(page.locator(".residents li", has_text=name)).to_contain_text(told)


def test_the_tab_can_be_left_and_opened_again(visit: Open, server: str) -> None:
    """Its charts were measured once more after they were gone, which the browser logged."""
    seen = visit(f"{server}/#/live")
    for _ in range(2):
        expect(seen.page.locator("[data-series=running]")).to_have_text("0")
        seen.page.get_by_role("link", name="Ask").click()
        expect(seen.page.get_by_label("Prompt", exact=True)).to_be_visible()
        seen.page.get_by_role("link", name="Live").click()
    expect(seen.page.locator("canvas")).to_have_count(5)


def test_a_server_that_is_gone_is_told(visit: Open, server: str) -> None:
    seen = visit(f"{server}/#/live")
    seen.expected.append("ERR_")
    expect(seen.page.locator("[data-series=running]")).to_have_text("0")
    seen.page.route("**/metrics", lambda route: route.abort())
    expect(seen.page.get_by_role("alert")).to_contain_text("cannot be reached")
    seen.page.unroute("**/metrics")
    expect(seen.page.get_by_role("alert")).to_have_count(0)


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_serious_and_nothing_is_too_wide(
    visit: Open, server: str, look: str
) -> None:
    seen = visit(f"{server}/#/live", look=look)
    expect(seen.page.locator("canvas")).to_have_count(5)
    expect(seen.page.locator("[data-series=running]")).to_have_text("0")
    seen.show(f"live-{look}")
    assert seen.axe() == []
    assert not seen.is_too_wide()
