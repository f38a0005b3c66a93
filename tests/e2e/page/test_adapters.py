"""The tab Adapters: what serves, with its certificate, and what an administrator does."""

from collections.abc import Callable

import httpx
import pytest
from page_visit import Visit
from paths import STORE
from playwright.sync_api import expect

from crma.store.manifest import TASK_FILES

pytestmark = pytest.mark.e2e

Open = Callable[..., Visit]


def use_key(visit: Visit, key: str) -> None:
    page = visit.page
    page.get_by_role("button", name="Key", exact=True).click()
    page.locator("#key").fill(key)
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("button", name="Key set")).to_be_visible()


def test_tasks_and_certificate_are_those_of_the_api(
    visit: Open, server: str, api: httpx.Client
) -> None:
    seen = visit(f"{server}/#/adapters")
    page = seen.page
    body = api.get("/adapters").json()
    for task in body["tasks"]:
        card = page.get_by_role("region", name=f"Task {task['name']}")
        expect(card).to_contain_text(task["digest"].removeprefix("sha256:")[:12])
        expect(card).to_contain_text(task["lineage"].removeprefix("sha256:")[:12])
        holdout = task["measured"]["holdout"]
        expect(card).to_contain_text(f"{holdout['accuracy'] * 100:.1f} %")
    layers = body["backbone"]["certificate"]["layers"]
    expect(page.locator(".certificate .norm")).to_have_count(len(layers))
    page.get_by_text("Numbers by layer").click()
    rows = page.get_by_role("group", name="Numbers by layer").locator("tbody tr")
    for index in (0, len(layers) - 1):
        told = rows.nth(index).locator("td").all_text_contents()
        layer = layers[index]
        assert told == [f"{layer[name]:.4f}" for name in ("norm", "bound", "gate")]


def test_admin_acts_need_the_admin_key_and_then_change_the_server(
    visit: Open, server: str, api: httpx.Client, admin_key: str
) -> None:
    seen = visit(f"{server}/#/adapters")
    seen.expected.append("401")
    page = seen.page
    page.get_by_label("Show what an admin key may do").check()
    card = page.get_by_role("region", name="Task finance")
    card.get_by_role("button", name="Load finance v1", exact=True).click()
    expect(page.get_by_label("This server asks for a key")).to_be_visible()
    page.locator("#key").fill(admin_key)
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("button", name="Key set")).to_be_visible()

    def resident() -> bool:
        tasks = api.get("/adapters").json()["tasks"]
        return next(task["resident"] for task in tasks if task["name"] == "finance")

    for act, told, after in (("Load", "in memory", True), ("Unload", "not loaded", False)):
        card.get_by_role("button", name=f"{act} finance v1", exact=True).click()
        expect(card.get_by_text(f"{act}: done")).to_be_visible()
        expect(card.locator(".badge").nth(1)).to_have_text(told)
        assert resident() is after


def test_an_upload_serves_and_is_rolled_back(
    visit: Open, server: str, api: httpx.Client, admin_key: str
) -> None:
    seen = visit(f"{server}/#/adapters")
    use_key(seen, admin_key)
    page = seen.page
    form = page.get_by_role("form", name="Upload a LoRA")
    form.get_by_label("Task").fill("code")
    source = STORE / "tasks/science/v1"
    form.get_by_label("Files").set_input_files([source / name for name in TASK_FILES])
    form.get_by_role("button", name="Upload").click()
    expect(form.get_by_text("published")).to_be_visible()
    card = page.get_by_role("region", name="Task code")
    expect(card).to_contain_text("serves v2")
    assert api.get("/adapters/code").json()["serving"] == "v2"
    card.get_by_role("button", name="Roll back code").click()
    card.get_by_role("button", name="Yes, roll back").click()
    expect(card).to_contain_text("serves v1")
    assert api.get("/adapters/code").json()["serving"] == "v1"


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_serious_and_nothing_is_too_wide(
    visit: Open, server: str, look: str
) -> None:
    seen = visit(f"{server}/#/adapters", look=look)
    expect(seen.page.get_by_role("region", name="Task science")).to_be_visible()
    seen.page.get_by_label("Show what an admin key may do").check()
    seen.page.get_by_text("Numbers by layer").click()
    seen.show(f"adapters-{look}")
    assert seen.axe() == []
    assert not seen.is_too_wide()
