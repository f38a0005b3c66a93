"""Programs of the repository that a command becomes: no module of `crma` imports them."""

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from crma.core.errors import CrmaError


def become(module: str, arguments: Sequence[str], *, folder: Path | None = None) -> NoReturn:
    """Run `python -m module` in place of this process, which signals then reach at once.

    Args:
        module: the name of an installed package, or of one in `folder`.
        arguments: of its command line.
        folder: a folder that is not on Python's path.

    Raises:
        CrmaError: there is no such module here.
    """
    if not _is_there(module, folder):
        message = f"There is no {module} here: the command needs a checkout of the repository."
        raise CrmaError(message, field=module)
    environment = dict(os.environ)
    if folder is not None:
        path = environment.get("PYTHONPATH", "")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), path]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *arguments], environment)


def options(given: Mapping[str, object]) -> list[str]:
    """A command line of options: a true flag without value, and nothing for None and False."""
    line = []
    for name, value in given.items():
        if value is not None and value is not False:
            line.append("--" + name.replace("_", "-"))
            line += [] if value is True else [str(value)]
    return line


def _is_there(module: str, folder: Path | None) -> bool:
    if folder is None:
        return importlib.util.find_spec(module) is not None
    return (folder / module / "__main__.py").is_file()
