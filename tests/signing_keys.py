"""Pairs of keys for the tests of signatures."""

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True)
class Keys:
    """PEM files of a private key and of its public key."""

    private: Path
    public: Path


def make_keys(folder: Path, name: str) -> Keys:
    """A new pair on P-256, as `openssl ecparam -name prime256v1 -genkey` makes one."""
    key = ec.generate_private_key(ec.SECP256R1())
    keys = Keys(folder / f"{name}.key", folder / f"{name}.pub")
    keys.private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    keys.public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return keys
