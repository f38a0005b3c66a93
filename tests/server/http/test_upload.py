"""server.http.upload: however the network cuts a form, its fields and files come out as sent."""

from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.http.upload import Upload
from server.service.errors import InvalidField, MalformedBody, UnknownField

FILES = {"one": bytes(range(256)) * 9, "two": b"\r\n--x\r\n--xy not the boundary\r\n"}
FIELDS = {"name": "medical", "licence": "é 🙂"}


def form(fields: dict[str, str], files: dict[str, bytes], part: str = "files") -> bytes:
    """A form whose boundary is `xyz`."""
    parts = []
    for name, value in fields.items():
        head = f'Content-Disposition: form-data; name="{name}"\r\n\r\n'
        parts.append(head.encode() + value.encode())
    for name, content in files.items():
        head = f'content-disposition: form-data; name="{part}"; filename="{name}"\r\n'
        kind = "Content-Type: application/octet-stream\r\n"  # either may come first
        heads = kind + head if name == "two" else head + kind
        parts.append(heads.encode() + b"\r\n" + content)
    body = b"".join(b"--xyz\r\n" + part + b"\r\n" for part in parts)
    return body + b"--xyz--\r\n"


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(cuts=st.lists(st.integers(0, len(form(FIELDS, FILES))), max_size=8))
def test_a_form_may_come_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    body = form(FIELDS, FILES)
    borders = [0, *sorted(cuts), len(body)]
    with TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        upload = Upload(Path(folder), FILES, FIELDS, b"xyz")
        for start, end in pairwise(borders):
            upload.write(body[start:end])
        assert upload.is_complete
        assert upload.fields == FIELDS
        assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == FILES


def named_by(name: bytes) -> bytes:
    """A form of one file with some bytes where its name stands."""
    head = b'--xyz\r\nContent-Disposition: form-data; name="files"; filename="'
    return head + name + b'"\r\n\r\ncontent\r\n--xyz--\r\n'


@settings(max_examples=300, derandomize=True, deadline=None)
@given(body=st.binary(max_size=60) | st.binary(max_size=20).map(named_by))
def test_no_bytes_make_a_file_of_another_name(
    tmp_path_factory: pytest.TempPathFactory, body: bytes
) -> None:
    with TemporaryDirectory(dir=tmp_path_factory.getbasetemp()) as folder:
        upload = Upload(Path(folder), FILES, FIELDS, b"xyz")
        with suppress(MalformedBody, InvalidField, UnknownField):
            upload.write(body)
        upload.files.close()
        assert {path.name for path in Path(folder).iterdir()} <= FILES.keys()


@pytest.mark.parametrize("name", ["three", "", "../one", "/one", "one\0", "ONE", "a/one", "."])
def test_a_file_of_another_name_is_refused_before_anything_is_written(
    tmp_path: Path, name: str
) -> None:
    upload = Upload(tmp_path, FILES, FIELDS, b"xyz")
    with pytest.raises(InvalidField) as caught:
        upload.write(form({}, {name: b"x"}))
    assert caught.value.field == "files"
    assert caught.value.allowed == ["one", "two"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "name", "allowed"),
    [
        (form({"licensed": "x"}, {}), "licensed", ["licence", "name"]),
        (form({"files": "x"}, {}), "files", ["licence", "name"]),
        (form({}, {"one": b"x"}, part="file"), "file", ["files"]),
        (form({}, {"one": b"x"}, part="name"), "name", ["files"]),
    ],
)
def test_a_part_of_another_name_is_refused_by_it(
    tmp_path: Path, body: bytes, name: str, allowed: list[str]
) -> None:
    upload = Upload(tmp_path, FILES, FIELDS, b"xyz")
    with pytest.raises(UnknownField) as caught:
        upload.write(body)
    assert (caught.value.field, caught.value.allowed) == (name, allowed)
    assert list(tmp_path.iterdir()) == []
