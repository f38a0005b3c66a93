"""The tab Ablation: a set is asked, followed, read, filtered, downloaded; errors have lines."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cutting_proxy import CuttingProxy
from page_visit import Visit
from playwright.sync_api import Locator, expect

pytestmark = pytest.mark.e2e

Open = Callable[..., Visit]
KINDS = {"a_only": "gained", "b_only": "lost", "both": "both right", "neither": "both wrong"}


def questions(api: httpx.Client, *tasks: str, num: int = 6) -> list[dict[str, Any]]:
    lines = api.get("/question_sets/public").raise_for_status().text.splitlines()
    every = [json.loads(line) for line in lines]
    return [each for task in tasks for each in [q for q in every if q["task"] == task][:num]]


def paste(visit: Visit, text: str) -> Locator:
    page = visit.page
    page.get_by_role("combobox", name="Question set").select_option(label="my own: paste or drop")
    page.get_by_label("Questions, one a line as JSON").fill(text)
    return page.get_by_role("button", name="Start")


def finished(visit: Visit) -> str:
    """Wait for the run that is open; returns its id."""
    visit.page.wait_for_url("**/#/ablation/abl-*")
    expect(visit.page.locator(".badge").first).to_have_text("done", timeout=180_000)
    return visit.page.url.rsplit("/", 1)[1]


@pytest.fixture
def run(visit: Open, server: str, api: httpx.Client) -> tuple[Visit, dict[str, Any]]:
    """A finished ablation of twelve questions, and what the API says of it."""
    seen = visit(f"{server}/#/ablation")
    asked = questions(api, "medical", "code")
    paste(seen, "\n".join(map(json.dumps, asked))).click()
    job = api.get(f"/ablation/{finished(seen)}").json()
    return seen, job


def test_the_report_has_the_numbers_of_the_api(run: tuple[Visit, dict[str, Any]]) -> None:
    seen, job = run
    page = seen.page
    result = job["result"]
    comparison = result["comparisons"][0]
    for field, label in KINDS.items():
        cell = page.locator(".flips button", has_text=label)
        expect(cell.locator("strong")).to_have_text(str(comparison["table"][field]))
    for name, variant in result["variants"].items():
        row = page.locator(f'.variants tr[data-variant="{name}"]')
        expect(row.locator(".accuracy")).to_have_text(f"{variant['accuracy'] * 100:.1f} %")
        low, high = (f"{each * 100:.1f}" for each in variant["wilson"])
        expect(row).to_contain_text(f"{low} to {high}")
        expect(row).to_contain_text(f"{variant['correct']} of {variant['scored']}")
    words = page.locator(".words").text_content() or ""
    points = f"{comparison['difference'] * 100:+.0f}".replace("-", "\u2212").replace("+0", "0")
    assert f"{points} points" in words
    if comparison["detectable_difference"] is not None:
        detectable = f"{comparison['detectable_difference'] * 100:.0f} points"
        assert f"80 of 100 runs with 12 questions would see a difference of {detectable}" in words
    page.get_by_text("Provenance").click()
    digests = page.locator(".provenance dd").all_text_contents()
    provenance = result["provenance"]
    for name in ("question_set", "base", "crma"):
        assert provenance[name] in digests
    assert set(provenance["tasks"].values()) <= set(digests)
    rows = page.locator(".by-task tbody tr")
    for index, (task, row) in enumerate(comparison["by_task"].items()):
        expect(rows.nth(index)).to_contain_text(task)
        expect(rows.nth(index)).to_contain_text(str(row["mcnemar"]["gained"]))


def test_items_are_filtered_by_cell_task_and_text(run: tuple[Visit, dict[str, Any]]) -> None:
    seen, job = run
    page = seen.page
    items = page.locator(".item")
    comparison = job["result"]["comparisons"][0]
    expect(items).to_have_count(12)
    for field, label in KINDS.items():
        page.get_by_role("combobox", name="Show").select_option(label=label)
        expect(items).to_have_count(comparison["table"][field])
    page.get_by_role("combobox", name="Show").select_option(label="all")
    page.locator(".flips button", has_text="gained").press("Enter")
    expect(items).to_have_count(comparison["table"]["a_only"])
    page.get_by_role("combobox", name="Show").select_option(label="all")
    page.locator(".filters").get_by_role("combobox", name="Task").select_option("code")
    expect(items).to_have_count(6)
    first = job["result"]["items"][6]
    page.get_by_role("searchbox", name="Text").fill(first["id"])
    expect(items).to_have_count(1)
    expect(items).to_contain_text(first["outputs"]["task"]["text"].strip())
    expect(items).to_contain_text(job["request"]["questions"][6]["question"].split("\n")[0])


def test_a_run_can_be_downloaded_run_again_and_found_by_its_address(
    run: tuple[Visit, dict[str, Any]], visit: Open, tmp_path: Path
) -> None:
    seen, job = run
    page = seen.page
    with page.expect_download() as download:
        page.get_by_role("button", name="Download JSON").click()
    download.value.save_as(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == job["result"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    download.value.save_as(tmp_path / "result.csv")
    with (tmp_path / "result.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == [item["id"] for item in job["result"]["items"]]
    right = [item["outputs"]["task"]["correct"] for item in job["result"]["items"]]
    assert [row["task: right"] == "true" for row in rows] == right
    other = visit(page.url)
    expect(other.page.locator(".flips")).to_be_visible()
    page.get_by_role("button", name="Run again").click()
    page.wait_for_url(lambda url: job["id"] not in url)
    assert finished(seen) != job["id"]
    page.get_by_role("link", name="New, and past runs").click()
    past = page.get_by_role("link", name="pasted questions")
    expect(past.first).to_be_visible()
    assert past.count() >= 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"id": "x"', "line 4: "),
        ('["x"]', "line 4: "),
        ('{"id": "x", "task": "medical", "question": "Q"}', r"line 4 answers: Field required"),
        ('{"id": "x", "task": "medicine", "question": "Q", "answers": ["a"]}', "line 4: no task"),
        (None, r"line 4 id was already used at line 1"),
    ],
    ids=["no JSON", "no object", "no answers", "unknown task", "id used twice"],
)
def test_what_is_wrong_with_pasted_questions_is_told_with_its_line(
    visit: Open, server: str, api: httpx.Client, line: str | None, told: str
) -> None:
    """A blank line counts."""
    seen = visit(f"{server}/#/ablation")
    seen.expected += ["422", "404"]
    first, second = (json.dumps(each) for each in questions(api, "medical", num=2))
    start = paste(seen, f"{first}\n\n{second}\n{line or first}")
    start.click()
    faults = seen.page.locator("#question-faults li")
    expect(faults).to_have_count(1)
    expect(faults).to_have_text(re.compile(told))
    assert seen.page.url.endswith("#/ablation")


def test_a_file_can_be_dropped(visit: Open, server: str, api: httpx.Client) -> None:
    seen = visit(f"{server}/#/ablation")
    text = "\n".join(map(json.dumps, questions(api, "legal", num=3)))
    data = seen.page.evaluate_handle(
        """(text) => { const data = new DataTransfer();
        data.items.add(new File([text], "mine.jsonl")); return data; }""",
        text,
    )
    seen.page.locator(".source").dispatch_event("drop", {"dataTransfer": data})
    expect(seen.page.get_by_text("3 questions")).to_be_visible()


def test_progress_is_live_and_a_run_can_be_cancelled(
    visit: Open, server: str, api: httpx.Client
) -> None:
    seen = visit(f"{server}/#/ablation")
    page = seen.page
    for name in ("crma", "base"):
        page.get_by_label(name, exact=True).check()
    page.get_by_role("button", name="Start").click()  # all of `public`
    page.wait_for_url("**/#/ablation/abl-*")
    expect(page.locator(".progress .figure")).to_have_text(re.compile(r"^[1-9]\d* of 400$"))
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".badge").first).to_have_text("cancelled")
    job = api.get(f"/ablation/{page.url.rsplit('/', 1)[1]}").json()
    assert job["status"] == "cancelled"


def test_a_run_is_followed_to_its_end_although_the_connection_is_lost(
    visit: Open, server: str, api: httpx.Client
) -> None:
    with CuttingProxy(server, cut_at=b"event: progress", after=2) as proxy:
        seen = visit(f"{proxy.url}/#/ablation")
        seen.expected.append("ERR_")
        paste(seen, "\n".join(map(json.dumps, questions(api, "finance", num=4)))).click()
        finished(seen)


def test_only_some_tasks_are_asked(visit: Open, server: str, api: httpx.Client) -> None:
    seen = visit(f"{server}/#/ablation")
    page = seen.page
    start = paste(seen, "\n".join(map(json.dumps, questions(api, "medical", "code", num=2))))
    page.get_by_text("Only some tasks").click()
    page.get_by_label("code (2 questions)").check()
    page.get_by_text("Only some tasks").click()  # what is ticked stays
    start.click()
    job = api.get(f"/ablation/{finished(seen)}").json()
    assert job["request"]["tasks"] == ["code"]
    assert {item["task"] for item in job["result"]["items"]} == {"code"}
    expect(page.locator(".item")).to_have_count(2)
    expect(page.get_by_text("only code")).to_be_visible()


def test_the_tasks_of_a_set_of_the_server_are_those_that_it_has(
    visit: Open, server: str, api: httpx.Client
) -> None:
    seen = visit(f"{server}/#/ablation")
    lines = api.get("/question_sets/public").text.splitlines()
    numbers = Counter(json.loads(line)["task"] for line in lines)
    seen.page.get_by_text("Only some tasks").click()
    for task, number in numbers.items():
        expect(seen.page.get_by_label(f"{task} ({number} questions)")).to_be_visible()


def test_a_set_is_kept_on_the_server_asked_and_deleted(
    visit: Open, server: str, api: httpx.Client, admin_key: str
) -> None:
    seen = visit(f"{server}/#/ablation")
    seen.expected.append("422")
    seen.use_key(admin_key)
    page = seen.page
    first, second, third = (json.dumps(each) for each in questions(api, "legal", num=3))
    paste(seen, f"{first}\n{first}")
    page.get_by_text("Keep it on the server").click()
    page.get_by_label("Name of the set").fill("from-here")
    page.get_by_role("button", name="Keep").click()
    expect(page.get_by_role("alert").filter(has_text="line 2")).to_be_visible()
    page.get_by_label("Questions, one a line as JSON").fill(f"{first}\n{second}\n{third}")
    page.get_by_label("Name of the set").press("Enter")  # which does not start an ablation
    chosen = page.get_by_role("combobox", name="Question set")
    expect(chosen.locator("option:checked")).to_have_text("from-here (3 questions)")
    kept = [each for each in api.get("/question_sets").json() if each["name"] == "from-here"]
    assert [(each["items"], each["source"]) for each in kept] == [(3, "shared")]
    page.get_by_role("button", name="Start").click()
    admin = {"Authorization": f"Bearer {admin_key}"}  # whose job it is
    job = api.get(f"/ablation/{finished(seen)}", headers=admin).json()
    assert job["request"]["question_set"] == "from-here"
    page.get_by_role("link", name="New, and past runs").click()
    chosen.select_option("from-here")
    page.get_by_role("button", name="Delete from-here").click()
    page.get_by_role("button", name="Yes, delete").click()
    expect(chosen.locator("option", has_text="from-here")).to_have_count(0)
    assert "from-here" not in {each["name"] for each in api.get("/question_sets").json()}


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_serious_and_nothing_is_too_wide(
    visit: Open, server: str, api: httpx.Client, look: str
) -> None:
    body = {"questions": questions(api, "medical", "code", num=2), "background": True}
    body["variants"] = ["task+crma", "task", "crma", "base"]
    id = api.post("/ablation", json=body).json()["id"]
    seen = visit(f"{server}/#/ablation", look=look)
    expect(seen.page.get_by_role("heading", name="Past runs")).to_be_visible()
    paste(seen, f"{json.dumps(body['questions'][0])}\nno JSON")
    for summary in ("Keep it on the server", "Only some tasks"):
        seen.page.get_by_text(summary).click()
    expect(seen.page.get_by_label("medical (1 question)")).to_be_visible()
    seen.show(f"ablation-form-{look}")
    assert seen.axe() == []
    assert not seen.is_too_wide()
    seen.page.goto(f"{server}/#/ablation/{id}")
    finished(seen)
    expect(seen.page.locator(".item")).to_have_count(4)
    seen.show(f"ablation-{look}")
    assert seen.axe() == []
    assert not seen.is_too_wide()
