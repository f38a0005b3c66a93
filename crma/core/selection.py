"""The adapters that one row of a batch uses, and the variants that an ablation compares."""

import re
from typing import Literal, NamedTuple

from crma.core.errors import ConfigError

Variant = Literal["base", "task", "crma", "task+crma"]
VARIANTS: tuple[Variant, ...] = ("base", "task", "crma", "task+crma")
_CELL = re.compile(
    r"base|(?:(task)(?:@([\w.-]+))?)?(?:(?:(?<=.)\+|^)(crma)(?:@([\w.-]+))?)?", re.ASCII
)


class Cell(NamedTuple):
    """One cell of an ablation's 2x2 table: whether the task adapter and the CRMA backbone are used.

    A version of None stands for the version that currently serves.
    """

    task: bool
    task_version: str | None
    crma: bool
    crma_version: str | None


def read_cell(variant: str) -> Cell:
    """Parse the name of a variant, such as "task", "task+crma" or "task@v2+crma@v1".

    Args:
        variant: one of VARIANTS; `@version` may follow "task" and "crma".

    Raises:
        ConfigError: `variant` is anything else.
    """
    found = _CELL.fullmatch(variant)
    if not variant or found is None:
        allowed = [*VARIANTS, "task@v1", "task@v1+crma@v1", "…"]
        message = f"There is no variant {variant!r}."
        raise ConfigError(message, field="variants", value=variant, allowed=allowed)
    return Cell(found[1] is not None, found[2], found[3] is not None, found[4])


class AdapterSelection(NamedTuple):
    """The task adapter and the CRMA backbone of one row, as content digests (`sha256:…`).

    None means that the adapter is not used; the row with neither runs the plain base model. Rows
    of one selection form a batch group and may share cached keys and values. Selections hold
    digests and never names: two names of one digest are the same selection, and a name that is
    published again gives another.
    """

    task_digest: str | None = None
    crma_digest: str | None = None

    @property
    def variant(self) -> Variant:
        """The ablation variant that this selection belongs to."""
        if self.task_digest is None:
            return "base" if self.crma_digest is None else "crma"
        return "task" if self.crma_digest is None else "task+crma"


BASE = AdapterSelection()
