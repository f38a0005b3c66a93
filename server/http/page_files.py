"""The files of the page (`server/http/page/`), read once: each with its type and its tag."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from fastapi.responses import Response

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".json": "application/json",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
}
"""What is served, by suffix; licences are in the folder too, and nobody loads them."""


@dataclass(frozen=True)
class PageFile:
    """A file of the page.

    Args:
        content: all of it.
        media_type: by which browsers treat it.
        tag: changes with the content.
    """

    content: bytes
    media_type: str
    tag: str

    def response(self, request: Request) -> Response:
        """The file; or 304 if the browser has it: it asks every time, so no page is a mixture."""
        headers = {"ETag": self.tag, "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == self.tag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def read_page(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Read the files of the page, by path relative to its folder."""
    files = {}
    for path in sorted(folder.rglob("*")):
        media_type = MEDIA_TYPES.get(path.suffix)
        if media_type is not None:
            content = path.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            files[path.relative_to(folder).as_posix()] = PageFile(content, media_type, tag)
    return files
