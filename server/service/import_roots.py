"""The folders below which an administrator may name an adapter to import."""

from collections.abc import Sequence
from pathlib import Path

from crma.core.errors import NotFound
from server.service.errors import Forbidden, InvalidField


def find_folder(path: str, roots: Sequence[Path]) -> Path:
    """The folder that a request names, once nothing in it leads out of the root that it is below.

    Args:
        path: absolute, or relative to a root.
        roots: where imports are allowed; links in them are followed as long as they stay below.

    Raises:
        Forbidden: there are no roots.
        InvalidField: the path, or a link on it or in the folder, leads out of every root.
        NotFound: there is no such folder.
    """
    if not roots:
        message = "importing from a path is off: this server has no import roots"
        raise Forbidden(message, field="CRMA_IMPORT_ROOTS")
    resolved = [_resolved(root / path, path) for root in roots]
    below = [
        folder for folder, root in zip(resolved, roots, strict=True) if _is_below(folder, root)
    ]
    if not below:
        message = "lora_path: not below an import root"
        allowed = [str(root) for root in roots]
        raise InvalidField(message, field="lora_path", value=path, allowed=allowed)
    for folder in below:
        if folder.is_dir():
            _check_links(folder, roots)
            return folder
    message = f"lora_path: no folder {path!r}"
    raise NotFound(message, field="lora_path", value=path, allowed="a folder")


def _resolved(candidate: Path, path: str) -> Path:
    """Where a path really leads. Raises InvalidField for one that cannot lead anywhere."""
    try:
        return candidate.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a NUL
        message = f"lora_path: not a path: {error}"
        raise InvalidField(message, field="lora_path", value=path, allowed="a path") from error


def _is_below(folder: Path, root: Path) -> bool:
    return folder.is_relative_to(root.resolve())


def _check_links(folder: Path, roots: Sequence[Path]) -> None:
    """Raises InvalidField for a file that is a link to a place outside all roots."""
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        message = f"lora_path: cannot be read: {error.strerror}"
        raise InvalidField(message, field="lora_path", value=str(folder)) from error
    for file in files:
        target = _resolved(file, str(file))
        if not any(_is_below(target, root) for root in roots):
            message = f"lora_path: {file.name} is a link that leads out of the import roots"
            allowed = "files below an import root"
            raise InvalidField(message, field="lora_path", value=str(file), allowed=allowed)
