"""Who sends a request, and what its key may do."""

from dataclasses import dataclass

from crma.access.key import Limits
from crma.access.scope import Scope

NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key, or anyone where no key is asked for.

    Attributes:
        name: of the key. Its jobs, its question sets and its share of the engine belong to it.
            Empty: the request has no key.
        tenant: keys of one tenant share cached prefixes. Empty: it shares them with no other.
        scopes: the groups of routes that are open to it.
        tasks: the names of the tasks that exist for it; None: all.
        limits: how much it may use.
    """

    name: str = ""
    tenant: str = ""
    scopes: frozenset[Scope] = frozenset()
    tasks: frozenset[str] | None = None
    limits: Limits = NO_LIMITS

    @property
    def cache_salt(self) -> str:
        """Requests with another salt share no cached prefixes with its own."""
        return f"tenant {self.tenant}" if self.tenant else self.name

    def may_use(self, task: str) -> bool:
        """Whether a task of this name exists for it."""
        return self.tasks is None or task in self.tasks

    def may_see(self, owner: str) -> bool:
        """Whether what belongs to `owner` exists for it: its own, or everything for an admin."""
        return owner == self.name or Scope.ADMIN in self.scopes


NOBODY = Caller()
"""Without a key where one is needed, or with an unknown one."""

ANYONE = Caller(scopes=frozenset({Scope.GENERATE, Scope.ABLATE}))
"""Without a key where none is needed."""

ADMIN = Caller("admin", scopes=frozenset(Scope))
"""Who has the admin key of the settings."""


def named_by_key(digest: str) -> Caller:
    """Who has one of the API keys of the settings, which have no names.

    Args:
        digest: SHA-256 of the key. A name made of it stays the same if the list is put into
            another order; a number would pass the jobs of one key on to another.
    """
    name = f"env-{digest[:12]}"
    return Caller(name, scopes=ANYONE.scopes)
