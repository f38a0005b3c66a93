"""GET /: the page, for people. It asks the same routes as every client, with the key of its user.

Its own files need no key: they are those of the release, and say nothing of this server.
"""

from functools import cache

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from server.http.auth import require_nothing
from server.http.page_files import INDEX, read_page

router = APIRouter(dependencies=[require_nothing], include_in_schema=False)

_files = cache(read_page)


@router.get("/")
def page(request: Request) -> Response:
    """The page."""
    return _files()[INDEX].response(request)


@router.get("/page/{path:path}")
def page_file(path: str, request: Request) -> Response:
    """A file of the page: a module, a style sheet, a vendored library."""
    file = _files().get(path)
    if file is None:
        raise HTTPException(404)
    return file.response(request)
