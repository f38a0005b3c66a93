"""The tab Adapters: what serves, with its certificate, and what an administrator does."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from page_visit import Visit
from paths import STORE
from playwright.sync_api import expect
from server_process import running_server

from crma.data.splits import split_path
from crma.method.backbone import Backbone
from crma.models.base_model import find_base
from crma.store.adapter_store import AdapterStore
from crma.store.channels import task_channel
from crma.store.manifest import TASK_FILES
from crma.store.opening import start_store

pytestmark = pytest.mark.e2e

Open = Callable[..., Visit]


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
    last = page.get_by_role("region", name="Task science")  # far below the key form
    last.get_by_role("button", name="Load science v1", exact=True).click()
    expect(page.get_by_label("This server asks for a key")).to_be_in_viewport()
    page.locator("#key").fill(admin_key)
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("button", name="Key set")).to_be_visible()

    def resident() -> bool:
        tasks = api.get("/adapters").json()["tasks"]
        return next(task["resident"] for task in tasks if task["name"] == "finance")

    for act, told, after in (
        ("Load", "in memory", True),
        ("Pin", "in memory", True),
        ("Unpin", "in memory", True),
        ("Unload", "not loaded", False),
    ):
        card.get_by_role("button", name=f"{act} finance v1", exact=True).click()
        expect(card.get_by_text(f"{act}: done")).to_be_visible()
        expect(card.locator(".badge").nth(1)).to_have_text(told)
        assert resident() is after


def test_an_upload_serves_and_is_rolled_back(
    visit: Open, server: str, api: httpx.Client, admin_key: str
) -> None:
    seen = visit(f"{server}/#/adapters")
    seen.use_key(admin_key)
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


def test_an_empty_store_says_how_a_task_comes_into_it(visit: Open, tmp_path: Path) -> None:
    """Every tab opens; it said that no task serves, and no more."""
    store = start_store(tmp_path / "store").root
    with running_server(CRMA_STORE=str(store)) as url:
        seen = visit(f"{url}/#/adapters")
        expect(seen.page.get_by_text("crma store import publishes a LoRA")).to_be_visible()
        for tab in ("Training", "Live"):
            seen.page.get_by_role("link", name=tab).click()
            expect(seen.page.get_by_text("No task serves.")).to_be_visible()
            assert seen.axe() == []
        seen.page.get_by_role("link", name="Ask").click()
        seen.page.get_by_role("button", name="Insert an example").click()
        expect(seen.page.get_by_text("No question set here asks anything.")).to_be_visible()


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


# The gate ---------------------------------------------------------------------------------------

JUDGED = "legal"
GATE_MS = 600_000  # it loads a second model, and scores a hundred questions twice


@pytest.fixture(scope="module")
def gate_server(tmp_path_factory: pytest.TempPathFactory, admin_key: str) -> Iterator[str]:
    """A server of one task, whose store has a candidate that hardly differs from its backbone."""
    if not split_path(JUDGED, "validation").exists():
        pytest.skip(f"no validation questions: crma data {JUDGED}")
    folder = tmp_path_factory.mktemp("gate")
    store = AdapterStore(shutil.copytree(STORE, folder / "store"))
    others = {task_channel(name): None for name in store.task_names() if name != JUDGED}
    store.set_serving(others)
    serving = store.backbone()
    assert serving is not None
    loaded = serving.load()
    tensors = {name: tensor * 1.001 for name, tensor in loaded.tensors().items()}
    store.publish_backbone(
        Backbone.from_tensors(loaded.config, tensors),
        lineage=[serving.digest, *serving.manifest.lineage],
        blend=None,
        serve=False,
        base=find_base(),
        trained_on=None,
        measured={},
        licence=serving.manifest.licence,
    )
    settings = {"CRMA_EVALUATIONS": str(folder / "kept"), "CRMA_STORE": str(store.root)}
    with running_server(CRMA_ADMIN_KEY=admin_key, **settings) as url:
        yield url


@pytest.fixture
def gate(gate_server: str, admin_key: str) -> Iterator[httpx.Client]:
    """An administrator's client of that server."""
    headers = {"Authorization": f"Bearer {admin_key}"}
    with httpx.Client(base_url=gate_server, headers=headers, timeout=60) as client:
        yield client


def with_a_dry_run(visit: Open, gate_server: str, admin_key: str) -> Visit:
    """The tab on which an administrator has begun a dry run."""
    seen = visit(f"{gate_server}/#/adapters")
    seen.use_key(admin_key)
    seen.page.get_by_role("button", name="Dry run").click()
    return seen


def check_history(visit: Open, gate_server: str, look: str) -> None:
    """The evidence of a promotion is a table in the history, for a reader without a key."""
    seen = visit(f"{gate_server}/#/adapters", look=look)
    card = seen.page.get_by_role("region", name="CRMA backbone")
    card.get_by_text("History").click()
    expect(card.locator(".evidence tbody tr").first).to_be_visible()
    seen.show(f"history-{look}")
    assert seen.axe() == []
    assert not seen.is_too_wide()


def test_a_dry_run_is_cancelled(
    visit: Open, gate_server: str, gate: httpx.Client, admin_key: str
) -> None:
    page = with_a_dry_run(visit, gate_server, admin_key).page
    expect(page.get_by_text("dry run of v2: running")).to_be_visible()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("dry run of v2: cancelled")).to_be_visible()
    assert gate.get("/backbones/promotion").json()["status"] == "cancelled"


def test_a_backbone_is_promoted_after_its_dry_run_and_rolled_back(
    visit: Open, gate_server: str, gate: httpx.Client, admin_key: str
) -> None:
    """The table has the evidence of the API."""
    seen = with_a_dry_run(visit, gate_server, admin_key)
    page = seen.page
    done = page.get_by_text("dry run of v2: done, nothing has changed")
    expect(done).to_be_visible(timeout=GATE_MS)
    evidence = gate.get("/backbones/promotion").json()["evidence"]
    assert gate.get("/backbones").json()["serving"] == "v1"
    rows = page.locator(".evidence tbody tr")
    expect(rows).to_have_count(sum(len(trial["tasks"]) for trial in evidence["tried"]))
    score = evidence["tried"][0]["tasks"][JUDGED]
    cells = rows.first.locator("th, td").all_text_contents()
    assert cells[:4] == [
        JUDGED,
        "1.000",
        f"{score['loss']:.4f}",
        f"{evidence['limits'][JUDGED]['limit']:.4f}",
    ]
    assert evidence["lambda"] == 1
    expect(rows.first.locator(".verdict")).to_have_text("ok")
    seen.show("promotion-light")
    assert seen.axe() == []
    page.get_by_role("button", name="Promote v2").click()
    expect(page.get_by_text("v2 was promoted")).to_be_visible(timeout=GATE_MS)
    assert gate.get("/backbones").json()["serving"] == "v2"
    card = page.get_by_role("region", name="CRMA backbone")
    expect(card.locator(".version", has_text="v2").locator(".badge")).to_have_text("serves")
    card.get_by_role("button", name="Roll back the backbone").click()
    card.get_by_role("button", name="Yes, roll back").click()
    expect(card.locator(".version", has_text="v1").locator(".badge")).to_have_text("serves")
    assert gate.get("/backbones").json()["serving"] == "v1"
    for look in ("dark", "phone"):
        check_history(visit, gate_server, look)
