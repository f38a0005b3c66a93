"""A person at the page: a browser tab, what it logged, and what axe-core says of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from paths import ROOT
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect

AXE = ROOT / "tests/e2e/page/vendor/axe.min.js"
SERIOUS = ("serious", "critical")
PHONE = {"width": 390, "height": 844}
DESK = {"width": 1280, "height": 860}
PATIENCE_MS = 60_000

expect.set_options(timeout=PATIENCE_MS)

_WATCH_SHIFTS = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push(entry.value);
}).observe({ type: "layout-shift", buffered: true });
"""


@dataclass
class Visit:
    """A tab of a browser.

    Attributes:
        errors: what the page logged as errors: exceptions, refused scripts and styles.
        asked: the addresses that it asked for.
        expected: parts of errors that this test expects.
        screenshots: where `show` saves pictures; None: nowhere.
    """

    page: Page
    context: BrowserContext
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)
    screenshots: Path | None = None

    @classmethod
    def of(cls, browser: Browser, url: str, look: str = "light") -> Self:
        """Open an address in a new tab that knows nothing of others.

        Args:
            look: light, dark or phone.
        """
        context = browser.new_context(
            viewport=PHONE if look == "phone" else DESK,
            color_scheme="dark" if look == "dark" else "light",
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(PATIENCE_MS)
        context.add_init_script(_WATCH_SHIFTS)
        page = context.new_page()
        visit = cls(page, context)
        page.on("console", visit._note)
        page.on("pageerror", lambda error: visit.errors.append(str(error)))
        page.on("request", lambda request: visit.asked.append(request.url))
        page.goto(url)
        return visit

    def _note(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.errors.append(message.text)

    def show(self, name: str) -> None:
        """Keep a picture of the whole page for people, if they asked for it."""
        if self.screenshots is not None:
            self.page.screenshot(path=self.screenshots / f"{name}.png", full_page=True)

    def use_key(self, key: str) -> None:
        """Give the page a key, as a person does."""
        self.page.get_by_role("button", name="Key", exact=True).click()
        self.page.locator("#key").fill(key)
        self.page.get_by_role("button", name="Use key").click()
        expect(self.page.get_by_role("button", name="Key set")).to_be_visible()

    def shifts(self) -> float:
        """How much has moved that nobody touched, as browsers measure it."""
        return self.page.evaluate("window.shifts.reduce((a, b) => a + b, 0)")

    def axe(self) -> list[str]:
        """What axe-core finds that is serious or critical."""
        self.page.evaluate(AXE.read_text())
        found: dict[str, Any] = self.page.evaluate("axe.run()")
        told = []
        for violation in found["violations"]:
            if violation["impact"] in SERIOUS:
                nodes = "; ".join(node["html"][:120] for node in violation["nodes"][:3])
                told.append(f"{violation['id']}: {nodes}")
        return told

    def is_too_wide(self) -> bool:
        """Whether the page has to be scrolled sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")

    def close(self) -> None:
        """Close the tab; nothing unexpected was logged."""
        self.context.close()
        left = [error for error in self.errors if not any(part in error for part in self.expected)]
        assert not left
