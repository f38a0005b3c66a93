"""Digests and the schema of manifest.json."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from paths import STORE

from crma.core.errors import InvalidAdapter
from crma.core.files import parse_json, to_json
from crma.store import manifest
from crma.store.channels import CHANNELS, Channels
from crma.store.manifest import (
    MANIFEST,
    TASK_FILES,
    BackboneManifest,
    TaskManifest,
    add_manifest,
    parse_record,
)

D0, D1 = "sha256:" + "0" * 64, "sha256:" + "1" * 64
PAGE = (STORE / "README.md").read_text("utf-8")
EXAMPLE, CHANGES = (
    json.loads(block.replace("sha256:…", D0))
    for block in re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
)
TASK = {
    key: value for key, value in EXAMPLE.items() if key not in ("format", "kind", "files", "digest")
}
BACKBONE = {
    key: TASK[key] for key in ("version", "base", "trained_on", "measured", "licence", "created")
}
BACKBONE |= {"config": {"num_layers": 2}, "certificate": {"holds": True}, "lineage": [D0]}
BACKBONE |= {"blend": {"parents": [D0, D1], "lambda": 0.5}}


def made(values: dict[str, Any]) -> dict[str, Any]:
    """A manifest's JSON."""
    kind, names = (
        (TaskManifest, TASK_FILES) if values is TASK else (BackboneManifest, BackboneManifest.FILES)
    )
    return json.loads(add_manifest(kind, dict.fromkeys(names, b"content"), **values)[MANIFEST])


def test_digests_are_those_of_the_bytes_and_the_documented_sum_over_sorted_lines(
    tmp_path: Path,
) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert (
        manifest.file_digest(tmp_path / "f")
        == "sha256:" + hashlib.sha256(b"abc" * 100_000).hexdigest()
    )
    text = f"a.txt {'1' * 64}\nb.txt {'0' * 64}"
    expected = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    for files in ({"b.txt": D0, "a.txt": D1}, {"a.txt": D1, "b.txt": D0}):
        assert manifest.content_digest(files) == expected


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
def test_a_field_that_is_wrong_is_refused_by_name(
    values: dict[str, Any], field: str, value: Any
) -> None:
    kind = TaskManifest if values is TASK else BackboneManifest
    with pytest.raises(InvalidAdapter, match=r"manifest\.json: ") as caught:
        parse_record(kind, json.dumps(made(values) | {field: value}).encode(), MANIFEST)
    assert None not in (caught.value.field, caught.value.allowed)


DEEP = b'{"a": ' * 100_000
TWICE = b'{"format": 1, "format": 1}'


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff{}", b"{" * 100_000, DEEP, TWICE, b"1" * 10_000, b'{"a": 1e999}']
)
def test_what_is_not_one_json_object_of_finite_numbers_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidAdapter, check=lambda error: error.field == MANIFEST):
        parse_json(data, MANIFEST)


def test_the_examples_of_the_format_page_are_valid() -> None:
    assert made(TASK).keys() == EXAMPLE.keys()
    parse_record(Channels, to_json(CHANGES), CHANNELS).check_integrity()
