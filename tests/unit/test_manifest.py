"""Digests and the schema of manifest.json."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crma.channels import CHANNELS, Channels
from crma.errors import DigestMismatch, InvalidAdapter
from crma.manifest import (
    BackboneManifest,
    TaskManifest,
    check_name,
    check_version,
    content_digest,
    file_digest,
    make_manifest,
    parse_manifest,
    parse_record,
)

D0, D1 = "sha256:" + "0" * 64, "sha256:" + "1" * 64
TASK: dict[str, Any] = {
    "kind": "task",
    "name": "medical",
    "version": "v1",
    "files": {"adapter_config.json": D0, "adapter_model.safetensors": D1},
    "base": {"name": "tiny", "digest": D0},
    "prompt_format": {"head": "<u>", "tail": "<a>", "stop": "</s>"},
    "rank": 8,
    "alpha": 16,
    "scaling": 2.0,
    "target_modules": ["q_proj", "v_proj"],
    "backbone": D1,
    "trained_on": {"data": {"train": D0}, "seed": 42, "commit": "abc", "arm": "MODULAR", "config": {"lr": 0.005}},
    "measured": {"validation": {"loss": 0.7, "n": 100, "interval": [0.6, 0.8]}},
    "licence": "Apache-2.0",
    "created": "2026-01-31T12:00:00Z",
}
BACKBONE: dict[str, Any] = {
    "kind": "backbone",
    "version": "v2",
    "files": {"config.json": D0, "crma.safetensors": D1},
    "base": {"name": "tiny", "digest": D0},
    "config": {"num_layers": 2},
    "lineage": [D0],
    "blend": {"parents": [D0, D1], "lambda": 0.5},
    "trained_on": None,
    "measured": {},
    "certificate": {"holds": True},
    "licence": "Apache-2.0",
    "created": "2026-01-31T12:00:00Z",
}


def edited(values: dict[str, Any], path: str, value: Any) -> bytes:
    """A valid manifest's bytes with one field set to something else (or removed, for ...)."""
    kind = TaskManifest if values["kind"] == "task" else BackboneManifest
    content = make_manifest(kind, values).to_dict()
    *parents, last = path.split(".")
    place = content
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(content).encode()


def test_content_digest_is_the_documented_sum_over_sorted_lines() -> None:
    text = f"a.txt {'1' * 64}\nb.txt {'0' * 64}"
    assert content_digest({"b.txt": D0, "a.txt": D1}) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@settings(derandomize=True, max_examples=50)
@given(st.dictionaries(st.text("abc.", min_size=1), st.sampled_from([D0, D1]), min_size=1), st.randoms())
def test_content_digest_depends_on_names_and_digests_and_not_on_their_order(files: dict[str, str], random: Any) -> None:
    shuffled = list(files.items())
    random.shuffle(shuffled)
    assert content_digest(dict(shuffled)) == content_digest(files)
    name = next(iter(files))
    assert content_digest({**files, name: D0 if files[name] == D1 else D1}) != content_digest(files)
    assert content_digest({**files, name + "x": D0}) != content_digest(files)


def test_file_digest_is_the_sha256_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert file_digest(tmp_path / "f") == "sha256:" + hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize(("kind", "values"), [(TaskManifest, TASK), (BackboneManifest, BACKBONE)])
def test_a_manifest_survives_the_round_trip_through_its_file(kind: Any, values: dict[str, Any]) -> None:
    manifest = make_manifest(kind, values)
    assert parse_manifest(kind, json.dumps(manifest.to_dict()).encode()) == manifest
    assert manifest.digest == content_digest(values["files"])


@pytest.mark.parametrize(
    ("values", "path", "value"),
    [
        (TASK, "surprise", 1),
        (TASK, "base.surprise", 1),
        (TASK, "trained_on.surprise", 1),
        (TASK, "format", 2),
        (TASK, "kind", "backbone"),
        (TASK, "name", "../evil"),
        (TASK, "name", "base"),
        (TASK, "name", "medical\n"),
        (TASK, "version", "v0"),
        (TASK, "digest", "md5:0"),
        (TASK, "files", {"adapter_config.json": D0}),
        (TASK, "files", {"adapter_config.json": D0, "../adapter_model.safetensors": D1}),
        (TASK, "rank", 0),
        (TASK, "rank", "8"),
        (TASK, "rank", True),
        (TASK, "scaling", 1.0),
        (TASK, "target_modules", []),
        (TASK, "backbone", "v1"),
        (TASK, "licence", ...),
        (TASK, "measured", {"loss": float("nan")}),
        (TASK, "measured", {"loss": [float("inf")]}),
        (TASK, "created", "yesterday"),
        (BACKBONE, "lineage", [D0, D0]),
        (BACKBONE, "lineage", [content_digest(BACKBONE["files"])]),
        (BACKBONE, "blend.lambda", 1.5),
        (BACKBONE, "blend.parents", [D0]),
        (BACKBONE, "certificate", {"max_norm": float("-inf")}),
    ],
)
def test_a_field_that_is_unknown_missing_or_wrong_is_refused_by_name(
    values: dict[str, Any], path: str, value: Any
) -> None:
    kind = TaskManifest if values is TASK else BackboneManifest
    with pytest.raises(InvalidAdapter) as caught:
        parse_manifest(kind, edited(values, path, value))
    assert "manifest.json" in caught.value.message
    assert caught.value.field is not None
    assert caught.value.allowed is not None


def test_a_digest_that_is_not_that_of_the_files_is_a_mismatch() -> None:
    with pytest.raises(DigestMismatch):
        parse_manifest(
            TaskManifest, edited(TASK, "files", {"adapter_config.json": D1, "adapter_model.safetensors": D1})
        )


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"\xff{}", b"{" * 100_000, b'{"a": ' * 100_000, b'{"format": 1, "format": 1}', b"1" * 10_000]
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidAdapter):
        parse_manifest(TaskManifest, data)


def test_a_number_too_large_to_be_finite_is_refused() -> None:
    data = edited(TASK, "measured", {"loss": 12345.0}).replace(b"12345.0", b"1e999")
    with pytest.raises(InvalidAdapter, match="not finite"):
        parse_manifest(TaskManifest, data)


def test_a_number_that_is_not_finite_cannot_be_published() -> None:
    with pytest.raises(InvalidAdapter):
        make_manifest(TaskManifest, {**TASK, "measured": {"loss": float("nan")}})


@pytest.mark.parametrize("name", ["", "base", "Medical", "-a", ".a", "a/b", "a\\b", "..", "a" * 65, "a\n", "é", "a\0"])
def test_what_is_not_a_task_name_never_reaches_the_file_system(name: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        check_name(name)
    assert caught.value.value == name


@pytest.mark.parametrize("version", ["", "1", "v", "v0", "v01", "v1/..", "v1\n", "v" + "9" * 10, "V1", "v١"])
def test_what_is_not_a_version_never_reaches_the_file_system(version: str) -> None:
    with pytest.raises(InvalidAdapter):
        check_version(version)


def test_the_examples_of_the_format_page_are_valid() -> None:
    page = (Path(__file__).parents[2] / "adapters_store" / "README.md").read_text()
    manifest, channels = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    example = json.loads(manifest.replace("sha256:…", D0))
    example["digest"] = content_digest(example["files"])
    assert parse_manifest(TaskManifest, json.dumps(example).encode()).to_dict() == example
    parse_record(Channels, channels.encode(), CHANNELS).check_integrity()
