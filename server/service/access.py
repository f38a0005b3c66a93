"""What must be right about keys before a server loads anything."""

import ipaddress

from crma.access.key_file import KeyFile
from crma.core.errors import ConfigError
from server.service.audit import AuditLog
from server.settings import Settings


def check_access(settings: Settings) -> None:
    """Check who could call this server, and the files of keys and acts.

    Raises:
        ConfigError: it would listen for others without keys, or a file cannot be used.
    """
    if settings.is_open and not settings.allow_open and not _is_loopback(settings.host):
        message = (
            f"{settings.host} can be reached from elsewhere, and everyone who does could generate, "
            "because no keys are set: set CRMA_API_KEYS, or CRMA_KEYS_FILE (crma keys add makes "
            "it); or CRMA_ALLOW_OPEN=true (--allow-open) to serve without keys"
        )
        allowed = "127.0.0.1, ::1 or localhost without keys"
        raise ConfigError(message, field="host", value=settings.host, allowed=allowed)
    if settings.keys_file is not None:
        KeyFile(settings.keys_file).read()
    AuditLog(settings.audit_log).check()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, or empty: every address
        return False
