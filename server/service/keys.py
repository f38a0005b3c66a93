"""The keys of a server: from a key that was sent to its caller.

They come from the settings and from the file of keys, which is read again when it changes.
"""

import asyncio
import logging
import os

from crma.access.key import Key, digest_of
from crma.access.key_file import KeyFile
from crma.access.scope import Scope
from crma.core.errors import ConfigError
from server.daemon_threads import DaemonThreads
from server.service.audit import Act, Audit
from server.service.caller import ADMIN, ANYONE, NOBODY, Caller, named_by_key
from server.service.errors import Forbidden
from server.settings import Settings

log = logging.getLogger("server")

POLL_S = 1.0


class Keys:
    """The API keys and the admin key of the settings, and the keys of the file.

    They are looked up by digest. How long that takes says nothing of a key: who sends guesses
    cannot choose their digests.

    Args:
        settings: of the server.
        audit: has a line for each key that is added or revoked while the server runs.

    Attributes:
        is_open: no keys are set, so that requests need none.

    Raises ConfigError as `KeyFile.read`.
    """

    def __init__(self, settings: Settings, audit: Audit) -> None:
        self.is_open = settings.is_open
        self._audit = audit
        self._file = None if settings.keys_file is None else KeyFile(settings.keys_file)
        self._from_settings: dict[str, Caller] = {}
        for secret in settings.api_keys:
            digest = digest_of(secret.get_secret_value())
            self._from_settings[digest] = named_by_key(digest)
        if settings.admin_key is not None:
            self._from_settings[digest_of(settings.admin_key.get_secret_value())] = ADMIN
        self._in_file: tuple[Key, ...] = ()
        self._show(self._from_settings)
        self._fingerprint = self._stat()
        self._threads = DaemonThreads()  # the file system of the file may hang
        self._watching: asyncio.Task[None] | None = None
        if self._file is not None:
            self._take(self._file.read())

    def caller(self, key: str | None) -> Caller:
        """Who sends a request with this key, or without one."""
        unknown = ANYONE if self.is_open else NOBODY
        if key is None:
            return unknown
        return self._callers.get(digest_of(key), unknown)

    def current(self, caller: Caller, scope: Scope) -> Caller:
        """The caller with what its key may do by now, for work that goes on after its request.

        Raises Forbidden if the key was revoked, or is not for `scope` any more.
        """
        found = ANYONE if self.is_open and not caller.name else None
        if caller.name:
            found = self._by_name.get(caller.name)
        if found is None or scope not in found.scopes:
            message = f"the key of this work is not for {scope} any more"
            raise Forbidden(message, field="Authorization")
        return found

    @property
    def has_admin(self) -> bool:
        """Whether any key is for admin routes."""
        return any(Scope.ADMIN in caller.scopes for caller in self._callers.values())

    @property
    def is_restricted(self) -> bool:
        """Whether some tasks do not exist for some key: then not everyone may see their names."""
        return any(caller.tasks is not None for caller in self._callers.values())

    def start(self) -> None:
        """Watch the file, if there is one."""
        if self._file is not None:
            self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """Stop watching."""
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._threads.wait(POLL_S)

    def refresh(self) -> list[Act]:
        """Read the file if it changed. A file that is damaged or gone changes no key: that a slip
        of the editor shuts everyone out is no better than that a revoked key works on.

        Returns:
            What was changed, and is not in the audit yet.
        """
        fingerprint = self._stat()
        if self._file is None or fingerprint == self._fingerprint:
            return []
        self._fingerprint = fingerprint
        try:
            keys = self._file.read()
        except ConfigError as error:
            log.error("the keys stay as they were: %s", error.message)
            return []
        before = {key.name: key for key in self._in_file}
        after = {key.name: key for key in keys}
        self._take(keys)
        names = sorted(before.keys() | after.keys())
        changed = [name for name in names if before.get(name) != after.get(name)]
        return [_change(name, before.get(name), after.get(name)) for name in changed]

    def _take(self, keys: tuple[Key, ...]) -> None:
        self._in_file = keys
        self._show({**{key.sha256: _caller(key) for key in keys}, **self._from_settings})

    def _show(self, callers: dict[str, Caller]) -> None:
        self._callers = callers
        self._by_name = {caller.name: caller for caller in callers.values()}

    def _stat(self) -> tuple[int, int, int] | None:
        """What is another once the file is another; None if it cannot be seen."""
        if self._file is None:
            return None
        try:
            found = os.stat(self._file.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                for act in await self._threads.run(self.refresh):
                    await self._audit.write(act)
            except Exception:
                log.exception("the file of keys cannot be watched now")


def _caller(key: Key) -> Caller:
    tasks = None if key.tasks is None else frozenset(key.tasks)
    return Caller(key.name, key.tenant or "", frozenset(key.scopes), tasks, key.limits)


def _change(name: str, before: Key | None, after: Key | None) -> Act:
    """The act that made one key another."""
    what = "change key"
    if before is None:
        what = "add key"
    elif after is None:
        what = "revoke key"
    return Act(who="file of keys", what=what, about={"key": name})
