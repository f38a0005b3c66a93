"""A pulled base model: its name, its identity and its folder.

A pulled model is the folder `<home>/models/<name>` in the Hugging Face layout (safetensors weights,
config, tokenizer), with the file `base.json`:

    {"format": 1, "name": ..., "digest": ..., "sources": {file: sha256}, "files": {file: sha256}}

`sources` are the files that the model was made from. They determine `digest`, the identity to which
adapters are bound. `files` are the files in the folder. The two differ for the default model, whose
only source is a GGUF file: machines that convert it with different library versions write different
files, but hold the same base model.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from crma.core.cache import cache_home
from crma.core.digests import content_digest, file_digest
from crma.core.errors import PullError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
BASE_JSON = "base.json"


@dataclass(frozen=True)
class BaseModel:
    """A base model in the cache: its name, digest and folder, and the digests of its sources."""

    name: str
    digest: str
    path: Path
    sources: dict[str, str]


def find_base(model: str = DEFAULT_MODEL, *, home: Path | None = None) -> BaseModel:
    """Find a pulled model. Nothing is fetched.

    Args:
        model: a name, a hub id ("owner/name") or a folder.
        home: the cache folder; None: `cache_home()`.

    Raises:
        PullError: the model has not been pulled, or its `base.json` is damaged.
    """
    models = (home or cache_home()) / "models"
    given = Path(model).expanduser()
    folders = [models / model.replace("/", "--"), given]
    if given.is_dir():
        folders.append(models / given.resolve().name)  # where pulling that folder puts it
    for folder in folders:
        if (folder / BASE_JSON).is_file():
            return read_base(folder)
    message = f"There is no pulled model {model!r}: run `crma pull {model}` first."
    allowed = [str(folder) for folder in folders]
    raise PullError(message, field="model", value=model, allowed=allowed)


def read_base(folder: Path, *, verify: bool = False) -> BaseModel:
    """Read the `base.json` of a pulled model.

    Args:
        folder: the model's folder.
        verify: also compare every file with its digest.

    Raises:
        PullError: `base.json` is missing or damaged; or, with `verify`, a file has changed.
    """
    advice = f"Delete {folder} and pull the model again."
    try:
        content = json.loads((folder / BASE_JSON).read_text(encoding="utf-8"))
        base = BaseModel(content["name"], content["digest"], folder, dict(content["sources"]))
        files = dict(content["files"])
        if content_digest(base.sources) != base.digest:
            raise ValueError("its digest is not that of its sources")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{folder / BASE_JSON} is damaged: {error}. {advice}"
        raise PullError(message, field=BASE_JSON, value=str(folder)) from error
    if verify:
        for name, digest in files.items():
            path = folder / name
            found = file_digest(path) if path.is_file() else "missing"
            if found != digest:
                message = f"{path} is damaged. {advice}"
                raise PullError(message, field=name, value=found, allowed=digest)
    return base
