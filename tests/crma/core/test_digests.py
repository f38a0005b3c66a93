"""crma.core.digests: published digests must never change, so known values are pinned here."""

from pathlib import Path

from crma.core.digests import bytes_digest, content_digest, file_digest, files_digest

ABC = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2
TWO_FILES = "sha256:212583953f8e2892a7ce116447d41ac91e3aba5d6c19d303e141db96cf7f5818"


def test_a_file_and_its_bytes_have_the_same_digest(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == bytes_digest(b"abc") == ABC


def test_a_set_of_files_is_identified_by_its_sorted_names_and_digests() -> None:
    digests = {"b": bytes_digest(b"2"), "a": bytes_digest(b"1")}
    one, two = digests["a"].removeprefix("sha256:"), digests["b"].removeprefix("sha256:")
    assert content_digest(digests) == bytes_digest(f"a {one}\nb {two}".encode()) == TWO_FILES
    assert files_digest({"a": b"1", "b": b"2"}) == TWO_FILES


def test_a_renamed_file_gives_another_digest() -> None:
    assert files_digest({"a": b"1"}) != files_digest({"b": b"1"})
