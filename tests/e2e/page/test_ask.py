"""The tab Ask: streams, comparisons, tokens, copies; a wrong key, a lost connection."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from cutting_proxy import CuttingProxy
from page_visit import Visit
from paths import ROOT
from playwright.sync_api import Locator, expect

pytestmark = pytest.mark.e2e

PROMPT = 'Which ICD-10-CM chapter covers "Cholera"?'
Open = Callable[..., Visit]
SELECTIONS: dict[str, dict[str, Any]] = {
    "base": {"task": None, "crma": False},
    "crma": {"task": None, "crma": True},
    "task": {"task": "medical", "crma": False},
    "task+crma": {"task": "medical", "crma": True},
}


def fill(
    visit: Visit, *, compare: bool = False, max_tokens: int = 12, shared: str = "task"
) -> None:
    page = visit.page
    page.get_by_label("Prompt", exact=True).fill(PROMPT)
    page.get_by_role("combobox", name="Task").select_option("medical")
    page.get_by_label("Most tokens").fill(str(max_tokens))
    page.get_by_label("Compare: base").set_checked(compare)
    if compare:
        page.get_by_label("Prompt format of all four").select_option(shared)


def ask(visit: Visit, **options: Any) -> None:
    fill(visit, **options)
    visit.page.locator("button.main").click()


def answer(visit: Visit, name: str) -> Locator:
    found = visit.page.get_by_role("article", name=f"Answer of {name}", exact=True)
    expect(found.locator(".state")).to_have_text(re.compile("token"))
    return found


def answered(api: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "max_tokens": 12, "logprobs": True, "top_logprobs": 5, **fields}
    return api.post("/generate", json=body).raise_for_status().json()


def test_an_answer_and_its_provenance_are_those_of_the_api(
    visit: Open, server: str, api: httpx.Client
) -> None:
    seen = visit(server)
    ask(seen)
    shown = answer(seen, "medical")
    truth = answered(api, task="medical")
    assert shown.locator(".answer-text").text_content() == truth["text"]
    shown.get_by_text("Provenance").click()
    digests = shown.locator(".provenance dd").all_text_contents()
    assert digests[:3] == [truth["provenance"][name] for name in ("base", "task", "crma")]


def test_a_token_shows_its_log_probability_and_the_five_likeliest(
    visit: Open, server: str, api: httpx.Client
) -> None:
    """By mouse and by keyboard."""
    seen = visit(server)
    ask(seen)
    shown = answer(seen, "medical")
    truth = answered(api, task="medical")
    panel = shown.locator(".token-panel")
    shown.locator(".token").nth(1).hover()
    figures = panel.locator("li .figure")
    expect(figures).to_have_count(5)
    for figure, each in zip(figures.all_text_contents(), truth["top_logprobs"][1], strict=True):
        assert math.isclose(float(figure.replace("\u2212", "-")), each["logprob"], abs_tol=6e-4)
    first = panel.text_content()
    shown.locator(".answer-text").focus()
    seen.page.keyboard.press("ArrowLeft")
    expect(panel).not_to_have_text(first or "")


@pytest.mark.parametrize("shared", ["task", "base", "own"])
def test_four_variants_side_by_side_are_those_of_the_api_and_their_parting_is_marked(
    visit: Open, server: str, api: httpx.Client, shared: str
) -> None:
    """Base and crma went through the chat template, and the task through its own format."""
    seen = visit(server)
    ask(seen, compare=True, shared=shared)
    format_of = {"task": "medical", "base": "base", "own": None}[shared]
    told = {
        "task": "All asked in the prompt format of medical (",
        "base": "All asked in the base model's chat template.",
        "own": "Not alike: base and crma asked in the base model's chat template, the others in",
    }
    expect(seen.page.locator(".format")).to_contain_text(told[shared])
    texts = {}
    for name, selection in SELECTIONS.items():
        texts[name] = answer(seen, name).locator(".token").all_text_contents()
        truth = answered(api, **selection, format_of=format_of)["text"]
        assert "".join(texts[name]).removesuffix("∎") == truth, name
    reference = texts["task+crma"]
    for name in ("base", "crma", "task"):
        marked = answer(seen, name).locator(".token.parts")
        if texts[name] == reference:
            expect(marked).to_have_count(0)
            continue
        expect(marked).to_have_count(1)
        at = answer(seen, name).evaluate(
            "card => [...card.querySelectorAll('.token')].findIndex(t => t.matches('.parts'))"
        )
        assert texts[name][:at] == reference[:at]
        assert texts[name][at] != (reference[at] if at < len(reference) else None)


def test_an_example_is_a_question_that_a_set_asks_of_the_task(
    visit: Open, server: str, api: httpx.Client
) -> None:
    seen = visit(server)
    page = seen.page
    page.get_by_role("combobox", name="Task").select_option("legal")
    page.get_by_role("button", name="Insert an example").click()
    lines = map(json.loads, api.get("/question_sets/public").text.splitlines())
    first = next(each["question"] for each in lines if each["task"] == "legal")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(first)


def test_a_question_is_asked_and_its_tokens_are_read_by_keyboard_alone(
    visit: Open, server: str
) -> None:
    seen = visit(server)
    page = seen.page
    expect(page.locator("#prompt")).to_be_visible()
    for key in ("Tab", "Enter", "Tab"):  # the link that skips header and tabs
        page.keyboard.press(key)
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type(PROMPT)
    page.keyboard.press("Control+Enter")
    shown = page.get_by_role("article")
    expect(shown.locator(".state")).to_have_text(re.compile("token"))
    text = shown.locator(".answer-text")
    for _ in range(20):
        page.keyboard.press("Tab")
        if text.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("ArrowRight")
    expect(shown.locator(".token-panel li")).to_have_count(5)


def test_a_phone_shows_the_answer_that_was_asked_for(visit: Open, server: str) -> None:
    """It began below the screen."""
    seen = visit(server, look="phone")
    ask(seen)
    answer(seen, "medical")
    expect(seen.page.get_by_role("article").locator(".answer-text")).to_be_in_viewport()
    seen.page.get_by_role("link", name="Live").click()
    expect(seen.page.get_by_role("heading", name="Live")).to_be_in_viewport()


def test_nothing_moves_while_answers_arrive(visit: Open, server: str) -> None:
    seen = visit(server)
    fill(seen, compare=True, max_tokens=40)
    seen.page.keyboard.press("Control+Enter")  # ignored outside the prompt
    seen.page.get_by_label("Prompt", exact=True).press("Control+Enter")
    first = seen.page.locator(".token").first
    expect(first).to_be_visible()
    before = seen.shifts()
    for name in SELECTIONS:
        answer(seen, name)
    assert seen.shifts() == before


def test_what_is_copied_gives_the_same_answer(visit: Open, server: str, api: httpx.Client) -> None:
    seen = visit(server)
    ask(seen)
    shown = answer(seen, "medical")
    truth = answered(api, task="medical")["text"]
    shown.get_by_text("As curl or Python").click()
    shown.get_by_label("Copy as curl").click()
    expect(shown.get_by_text("Copied")).to_be_visible()
    curl = seen.page.evaluate("navigator.clipboard.readText()")
    told = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True)
    assert f'"text":"{truth}"' in told.stdout.replace('": "', '":"')
    code = shown.locator("pre").nth(1).text_content() or ""
    environment = {"PYTHONPATH": str(ROOT / "clients/python")}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == truth.strip()


def test_a_connection_that_is_lost_in_mid_stream_is_told_and_keeps_what_came(
    visit: Open, server: str
) -> None:
    with CuttingProxy(server, cut_at=b"event: token") as proxy:
        seen = visit(proxy.url)
        seen.expected.append("ERR_")
        ask(seen)
        shown = seen.page.get_by_role("article", name="Answer of medical")
        expect(shown.get_by_role("alert")).to_have_text(
            "The connection ended before the answer did."
        )
        expect(shown.locator(".state")).to_have_text("failed")
        assert shown.locator(".token").count() >= 1
        proxy.cut_at = b""
        seen.page.locator("button.main").click()  # and it can be asked again
        answer(seen, "medical")


def test_a_refusal_of_the_server_is_shown_in_its_own_words(visit: Open, server: str) -> None:
    seen = visit(server)
    seen.expected.append("400")
    ask(seen, max_tokens=99_999)
    alert = seen.page.get_by_role("article").get_by_role("alert")
    expect(alert).to_contain_text("maximum context length")


def test_a_server_with_keys_asks_for_one_and_a_wrong_one_is_told(
    visit: Open, keyed_server: str, api_key: str
) -> None:
    seen = visit(keyed_server)
    seen.expected.append("401")
    field = seen.page.get_by_label("This server asks for a key")
    field.fill("a wrong key")
    seen.page.get_by_role("button", name="Use key").click()
    expect(seen.page.get_by_role("alert")).to_contain_text("The server does not take this key.")
    assert seen.page.evaluate("sessionStorage.length") == 0
    assert seen.axe() == []
    field.fill(api_key)
    field.press("Enter")
    expect(field).to_have_count(0)
    ask(seen)
    shown = answer(seen, "medical")
    assert seen.page.evaluate("Object.values(sessionStorage)") == [api_key]
    assert seen.page.evaluate("localStorage.length + document.cookie.length") == 0
    shown.get_by_text("As curl or Python").click()
    assert api_key not in seen.page.content()


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_serious_and_nothing_is_too_wide(
    visit: Open, server: str, look: str
) -> None:
    seen = visit(server, look=look)
    ask(seen, compare=True)
    for name in SELECTIONS:
        shown = answer(seen, name)
        shown.locator(".token").first.click()
        shown.get_by_text("Provenance").click()
        shown.get_by_text("As curl or Python").click()
    seen.show(f"ask-{look}")
    assert seen.axe() == []
    assert not seen.is_too_wide()


def test_the_page_asks_nobody_but_its_server(visit: Open, server: str) -> None:
    seen = visit(server)
    ask(seen)
    answer(seen, "medical")
    assert [url for url in seen.asked if not url.startswith(server)] == []
