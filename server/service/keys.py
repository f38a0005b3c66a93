"""The keys of a server: from a key that was sent to its caller."""

import hashlib

from pydantic import SecretStr

from server.service.caller import ADMIN, ANYONE, NOBODY, Caller, named_by_key
from server.settings import Settings


class Keys:
    """The API keys and the admin key of the settings.

    They are looked up by digest. How long that takes says nothing of a key: who sends guesses
    cannot choose their digests.
    """

    def __init__(self, settings: Settings) -> None:
        self._callers: dict[str, Caller] = {}
        for key in settings.api_keys:
            digest = _digest(key.get_secret_value())
            self._callers[digest] = named_by_key(digest)
        self.is_open = not self._callers
        self.has_admin = settings.admin_key is not None
        if settings.admin_key is not None:
            self._add_admin(settings.admin_key)

    def caller(self, key: str | None) -> Caller:
        """Who sends a request with this key, or without one."""
        unknown = ANYONE if self.is_open else NOBODY
        if key is None:
            return unknown
        return self._callers.get(_digest(key), unknown)

    def _add_admin(self, key: SecretStr) -> None:
        self._callers[_digest(key.get_secret_value())] = ADMIN


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
