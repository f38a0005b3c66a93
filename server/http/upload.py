"""Reads multipart/form-data piece by piece: short fields into memory, files into a folder.

Nothing in the body becomes a path: a file has one of the names that the caller expects.
"""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from fastapi import HTTPException, Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from server.daemon_threads import DaemonThreads
from server.service.errors import InvalidField, MalformedBody, UnknownField

MAX_FIELD_BYTES = 1024
FILES = "files"


@dataclass
class _Part:
    """One part of the body: a file, or a field with its data.

    header: the name of the header that is being read.
    """

    name: str = ""
    disposition: bytes = b""
    header: bytes = b""
    data: bytearray = field(default_factory=bytearray)
    file: BinaryIO | None = None


class Upload:
    """A form that is being read.

    Args:
        folder: where the files go; empty.
        known_files: the names that a file may have. Each may come once, in a part named `files`.
        known_fields: the names of the other parts. Each may come once.
        boundary: of the parts.

    Attributes:
        fields: the fields that have come, by name.
        is_complete: the last part has come.
    """

    def __init__(
        self,
        folder: Path,
        known_files: Collection[str],
        known_fields: Collection[str],
        boundary: bytes,
    ) -> None:
        self.folder = folder
        self.known_files = known_files
        self.known_fields = known_fields
        self.fields: dict[str, str] = {}
        self.is_complete = False
        self.files = ExitStack()  # the open file
        self._part = _Part()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._open,
                "on_part_data": self._add_data,
                "on_part_end": self._end,
                "on_end": self._complete,
            },
        )

    def write(self, data: bytes) -> None:
        """Take the next piece of the body.

        Raises:
            MalformedBody: this is no multipart body.
            UnknownField: a part has another name.
            InvalidField: a field comes twice or is too long, or a file has another name.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed() from error

    # What the parser calls ---------------------------------------------------------------------

    def _begin(self) -> None:
        self._part = _Part()

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._part.header += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        if self._part.header.lower() == b"content-disposition":
            self._part.disposition += data[start:end]

    def _end_header(self) -> None:
        self._part.header = b""

    def _open(self) -> None:
        """The headers of a part are there: a file is opened under its checked name."""
        _, options = parse_options_header(self._part.disposition)
        self._part.name = _as_text(options.get(b"name", b""))
        if b"filename" in options:
            if self._part.name != FILES:
                raise _unknown(self._part.name, [FILES])
            self._part.file = self._new_file(_as_text(options[b"filename"]))

    def _new_file(self, name: str) -> BinaryIO:
        if name not in self.known_files:
            message = f"files: {name!r} is not a file of an adapter"
            raise InvalidField(message, field="files", value=name, allowed=sorted(self.known_files))
        try:
            return self.files.enter_context((self.folder / name).open("xb"))
        except FileExistsError:
            message = f"files: {name!r} comes twice"
            raise InvalidField(message, field="files", value=name, allowed="each once") from None

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        part = self._part
        if part.file is not None:
            part.file.write(data[start:end])
            return
        part.data += data[start:end]
        if len(part.data) > MAX_FIELD_BYTES:
            allowed = f"<= {MAX_FIELD_BYTES} bytes; a file has a filename"
            message = f"{part.name}: too long"
            raise InvalidField(message, field=part.name, value=len(part.data), allowed=allowed)

    def _end(self) -> None:
        part = self._part
        if part.file is not None:
            self.files.close()
            return
        if part.name not in self.known_fields:
            raise _unknown(part.name, sorted(self.known_fields))
        if part.name in self.fields:
            message = f"{part.name}: comes twice"
            raise InvalidField(message, field=part.name, value=None, allowed="once")
        self.fields[part.name] = _as_text(bytes(part.data))

    def _complete(self) -> None:
        self.is_complete = True


async def receive_form(
    request: Request,
    folder: Path,
    known_files: Collection[str],
    known_fields: Collection[str],
    threads: DaemonThreads,
) -> dict[str, str]:
    """Read a form whose files go into `folder`, off the event loop.

    Args:
        request: its body has not been read.
        folder, known_files, known_fields: as for `Upload`.
        threads: write the files.

    Returns:
        The form's fields.

    Raises:
        MalformedBody: the body is no form, or ends early.
        UnknownField, InvalidField: a field or a file does not belong into it.
        HTTPException: the client went away.
    """
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise _malformed()
    upload = Upload(folder, known_files, known_fields, options[b"boundary"])
    try:
        async for piece in request.stream():
            await threads.run(partial(upload.write, piece))
    except ClientDisconnect as error:
        raise HTTPException(400) from error  # as for any other body: error_handlers.py
    finally:
        await threads.run(upload.files.close)  # which writes what is left
    if not upload.is_complete:
        raise _malformed()
    return upload.fields


def _unknown(name: str, known: Collection[str]) -> UnknownField:
    message = f"unknown field {name!r}"
    return UnknownField(message, field=name, value=None, allowed=known)


def _as_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _malformed() from error


def _malformed() -> MalformedBody:
    message = "the body is not a complete form with files"
    return MalformedBody(message, field="body", allowed="multipart/form-data")
