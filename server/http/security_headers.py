"""Headers that tell browsers how little the answers of this server may do."""

import base64
import hashlib
import re
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ALWAYS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

# Our pages and those of the documentation are bundled: they load nothing from elsewhere, and call
# this server only. Swagger UI and charts set styles in their own elements; Swagger UI has images in
# its style sheet.
_PAGE = (
    "default-src 'none'",
    "connect-src 'self'",
    "img-src 'self' data:",
    "style-src 'self' 'unsafe-inline'",
    "base-uri 'none'",
    "form-action 'self'",
    "frame-ancestors 'none'",
)
_INLINE_SCRIPT = re.compile(rb'<script(?: type="importmap")?>(.*?)</script>', re.DOTALL)


@dataclass
class SecurityHeaders:
    """ASGI middleware: no guessing of types, and a content security policy for pages.

    A page's own scripts are allowed by their hashes, so that text which found its way into a page
    is no script.
    """

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        page: Message | None = None  # its start, which waits for its scripts

        async def send_with_headers(message: Message) -> None:
            nonlocal page
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(ALWAYS)
                if headers.get("content-type", "").startswith("text/html"):
                    page = message
                    return
            elif page is not None:
                policy = content_security_policy(message.get("body", b""))
                MutableHeaders(scope=page)["Content-Security-Policy"] = policy
                await send(page)
                page = None
            await send(message)

        await self.app(scope, receive, send_with_headers)


def content_security_policy(page: bytes) -> str:
    """The policy of a page, which is one piece. An import map is an inline script too."""
    scripts = ["script-src 'self'"]
    for script in _INLINE_SCRIPT.findall(page):
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        scripts.append(f"'sha256-{digest}'")
    return "; ".join((*_PAGE, " ".join(scripts)))
