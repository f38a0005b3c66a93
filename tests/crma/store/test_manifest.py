"""The schema of `manifest.json`, the digests in it, and the examples of the format's page."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from json_values import json_values
from paths import STORE

from crma.core.digests import content_digest, file_digest
from crma.core.errors import DigestMismatch, InvalidAdapter, StoreError
from crma.core.files import parse_json, to_json
from crma.store.channels import CHANNELS, Channels
from crma.store.manifest import (
    MANIFEST,
    BackboneManifest,
    TaskManifest,
    add_manifest,
    parse_record,
)

D0, D1 = "sha256:" + "0" * 64, "sha256:" + "1" * 64
PAGE = (STORE / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
EXAMPLE, CHANGES = (json.loads(block.replace("sha256:…", D0)) for block in BLOCKS)
ADDED = ("format", "kind", "files", "digest")  # by `add_manifest`
SHARED = ("version", "base", "trained_on", "measured", "licence", "created")
TASK = {key: value for key, value in EXAMPLE.items() if key not in ADDED}
BACKBONE = {
    **{key: TASK[key] for key in SHARED},
    "config": {"num_layers": 2},
    "certificate": {"holds": True},
    "lineage": [D0],
    "blend": {"parents": [D0, D1], "lambda": 0.5},
}


def made(values: dict[str, Any]) -> dict[str, Any]:
    """The manifest that `add_manifest` writes, parsed."""
    kind = TaskManifest if values is TASK else BackboneManifest
    files = dict.fromkeys(kind.FILES, b"content")
    return json.loads(add_manifest(kind, files, **values)[MANIFEST])


def test_a_file_digest_is_the_sha256_of_its_bytes(tmp_path: Path) -> None:
    data = b"abc" * 100_000
    (tmp_path / "f").write_bytes(data)
    assert file_digest(tmp_path / "f") == "sha256:" + hashlib.sha256(data).hexdigest()


def test_a_content_digest_is_the_documented_sum_over_sorted_lines() -> None:
    text = f"a.txt {'1' * 64}\nb.txt {'0' * 64}"
    expected = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    for files in ({"b.txt": D0, "a.txt": D1}, {"a.txt": D1, "b.txt": D0}):
        assert content_digest(files) == expected


WRONG = [
    (TASK, "prompt_format", {"surprise": "x"}),
    (TASK, "format", 2),
    (TASK, "name", "../evil"),
    (TASK, "files", {"adapter_config.json": D0, "../adapter_model.safetensors": D1}),
    (TASK, "measured", {"loss": [float("inf")]}),
    (BACKBONE, "lineage", [D0, D0]),
    (BACKBONE, "lineage", [made(BACKBONE)["digest"]]),
]


@pytest.mark.parametrize(("values", "field", "value"), WRONG)
def test_a_wrong_field_is_refused_by_name(values: dict[str, Any], field: str, value: Any) -> None:
    kind = TaskManifest if values is TASK else BackboneManifest
    with pytest.raises(InvalidAdapter, match=r"manifest\.json: ") as caught:
        parse_record(kind, json.dumps(made(values) | {field: value}).encode(), MANIFEST)
    assert None not in (caught.value.field, caught.value.allowed)


DEEP = b'{"a": ' * 100_000
TWICE = b'{"format": 1, "format": 1}'


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff{}", b"{" * 100_000, DEEP, TWICE, b"1" * 10_000, b'{"a": 1e999}']
)
def test_anything_but_one_json_object_of_finite_numbers_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidAdapter, check=lambda error: error.field == MANIFEST):
        parse_json(data, MANIFEST)


def test_the_examples_on_the_formats_page_are_valid() -> None:
    assert made(TASK).keys() == EXAMPLE.keys()
    parse_record(Channels, to_json(CHANGES), CHANNELS).check_integrity()


Kind = type[TaskManifest] | type[BackboneManifest]


def read_or_refused(kind: Kind, data: bytes) -> TaskManifest | BackboneManifest | StoreError:
    """The manifest, or the error that names the field; both in a bounded time."""
    try:
        return parse_record(kind, data, MANIFEST)
    except (InvalidAdapter, DigestMismatch) as error:
        refused = error
    assert refused.field
    assert len(str(refused)) < 5000
    return refused


def kind_of(values: dict[str, Any]) -> Kind:
    return TaskManifest if values is TASK else BackboneManifest


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.sampled_from([TASK, BACKBONE]), st.data())
def test_a_manifest_with_any_field_changed_is_read_as_it_is_or_refused(
    values: dict[str, Any], data: st.DataObject
) -> None:
    """What is read is written as it was: no field is dropped, and none is turned into another."""
    manifest = made(values)
    field = data.draw(st.sampled_from([*manifest, "surprise"]))
    manifest[field] = data.draw(json_values())
    read = read_or_refused(kind_of(values), json.dumps(manifest).encode())
    if not isinstance(read, StoreError):
        assert json.loads(to_json(read)) == manifest
        assert parse_record(kind_of(values), to_json(read), MANIFEST) == read


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 1999), st.integers(0, 50))
def test_a_damaged_manifest_is_read_or_refused(damage: bytes, start: int, length: int) -> None:
    intact = to_json(made(TASK))
    start %= len(intact)
    damaged = intact[:start] + damage + intact[start + length :]
    read_or_refused(TaskManifest, damaged)
