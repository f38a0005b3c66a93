"""Signatures of versions, as OpenSSF's model signing makes them with an elliptic key.

The signature of the version at `<place>` is `signatures/<place>.json` in the store: beside the
version, whose files never change. It is a Sigstore bundle over the SHA-256 of each of its files.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from crma.core.digests import bytes_digest
from crma.core.errors import ConfigError, NotSigned, StoreError
from crma.core.files import (
    MAX_JSON_BYTES,
    about,
    invalid,
    locked,
    plain_folder,
    read_regular,
    replace_file,
)
from crma.store.manifest import MANIFEST, parse_record

if TYPE_CHECKING:
    from crma.store.entry import BackboneEntry, TaskEntry

FOLDER = "signatures"
FOLDER_SIGNATURE = "model.sig"  # where OpenSSF's command writes the signature of a folder


def signature_path(root: Path, place: str) -> Path:
    """The file that holds the signature of a version.

    Args:
        root: of the store.
        place: of the version, relative to `root`.
    """
    return root / FOLDER / f"{place}.json"


def sign(root: Path, entry: TaskEntry | BackboneEntry, private_key: Path) -> None:
    """Sign a version. The caller has checked that its files are those of its manifest.

    Args:
        root: of the store; the signature replaces an earlier one.
        private_key: PEM of an elliptic key on P-256, P-384 or P-521, not encrypted.

    Raises:
        ConfigError: the key cannot be used, or the library is not installed.
        StoreError: the manifest is no longer the one that was read.
    """
    with _library("private key", private_key):
        from model_signing import signing

        from crma.store.signed_files import SignedFiles

        signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
    signer.set_hashing_config(SignedFiles(_digests(entry)))
    path = signature_path(root, entry.manifest.place)
    with tempfile.TemporaryDirectory() as folder:
        signature = Path(folder) / path.name
        signer.sign(entry.path, signature)
        data = signature.read_bytes()
    with locked(root):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


def check_signature(root: Path, entry: TaskEntry | BackboneEntry, public_key: Path) -> None:
    """Whether a version is signed, as it was read: what was read is what is compared.

    Only the manifest is read again: the digests in it are those that the other files must have when
    they are loaded.

    Args:
        root: of the store.
        public_key: PEM of the key whose signature counts.

    Raises:
        NotSigned: there is no signature, or it is of another key or of other files.
        ConfigError: the key cannot be used, or the library is not installed.
    """
    place = entry.manifest.place
    with _library("public key", public_key):
        from model_signing import verifying

        from crma.store.signed_files import SignedFiles

        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    verifier.set_hashing_config(SignedFiles(_digests(entry)))
    with tempfile.NamedTemporaryFile() as copy:
        copy.write(_read_signature(root, place))
        copy.flush()
        try:
            verifier.verify(entry.path, Path(copy.name))
        except Exception as error:  # a hostile file can make the library raise anything
            reason = str(error) or type(error).__name__
            raise _not_signed(place, f"its signature does not count: {reason}") from error


@contextmanager
def signed_copy(folder: Path, public_key: Path) -> Iterator[Path]:
    """A copy of a folder with an adapter from elsewhere, which holds a signature of all its files.

    The copy is what was checked, whatever happens to the folder meanwhile. Links are followed. It
    is gone when the block ends.

    Args:
        folder: with `model.sig`, as `model_signing sign key` writes it.
        public_key: PEM of the key whose signature counts.

    Raises:
        NotSigned, ConfigError: as `check_signature`.
    """
    with _library("public key", public_key):
        from model_signing import verifying

        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    if not (folder / FOLDER_SIGNATURE).is_file():
        raise _not_signed(str(folder), f"it holds no {FOLDER_SIGNATURE}")
    with tempfile.TemporaryDirectory() as copies:
        copy = Path(copies) / folder.resolve().name
        try:
            shutil.copytree(folder, copy)
        except OSError as error:
            raise _not_signed(str(folder), f"it cannot be read: {error}") from error
        try:
            verifier.verify(copy, copy / FOLDER_SIGNATURE)
        except Exception as error:  # as above
            reason = str(error) or type(error).__name__
            message = f"{FOLDER_SIGNATURE} does not count: {reason}"
            raise _not_signed(str(folder), message) from error
        yield copy


def _read_signature(root: Path, place: str) -> bytes:
    path = signature_path(root, place)
    try:
        plain_folder(root, str(path.parent.relative_to(root)))
        return read_regular(path, MAX_JSON_BYTES)
    except StoreError as error:
        raise _not_signed(place, "it has no signature") from error


def _digests(entry: TaskEntry | BackboneEntry) -> dict[str, str]:
    """File name -> digest, of all files of a version. Raises StoreError if the manifest changed."""
    with about(entry.manifest.place):
        data = read_regular(entry.path / MANIFEST, MAX_JSON_BYTES)
        if parse_record(type(entry.manifest), data, MANIFEST) != entry.manifest:
            raise invalid("Changed while it was read.", MANIFEST, None, "a version never changes")
    return {**entry.manifest.files, MANIFEST: bytes_digest(data)}


def _not_signed(place: str, reason: str) -> NotSigned:
    message = f"{place}: not signed by the key that is required: {reason}."
    return NotSigned(message, field="signature", value=place, allowed="crma store sign")


@contextmanager
def _library(kind: str, key: Path) -> Iterator[None]:
    """Raises ConfigError for a key that the library cannot use, or if there is no library."""
    try:
        yield
    except ImportError as error:
        message = "signatures need the package model-signing: pip install 'crma-server[signing]'"
        raise ConfigError(message, field="require_signature", value=str(key)) from error
    except (OSError, ValueError, TypeError) as error:
        message = f"the {kind} {key} cannot be used: {error}"
        allowed = "a PEM file of an elliptic key on P-256, P-384 or P-521, not encrypted"
        raise ConfigError(
            message, field="require_signature", value=str(key), allowed=allowed
        ) from error
