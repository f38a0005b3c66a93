"""A pulled base model: its name, its identity and its folder.

A pulled model is a folder `<home>/models/<name>` in the Hugging Face layout (safetensors weights,
config, tokenizer) with `base.json` beside them:

    {"format": 1, "name": ..., "digest": ..., "sources": {file: sha256}, "files": {file: sha256}}

`sources` are the files the model came from and decide `digest`, the identity that adapters are bound
to; `files` are the files in the folder. They differ for the default model, whose one source is a
GGUF file: two machines that convert it with different library versions still hold the same base model.
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
    """A base model in the cache: its name, its identity, its folder, and the digests of the files it came from."""

    name: str
    digest: str
    path: Path
    sources: dict[str, str]


def find_base(model: str = DEFAULT_MODEL, *, home: Path | None = None) -> BaseModel:
    """A model that was pulled before, by name, hub id or folder. Fetches nothing. Raises PullError."""
    models = (home or cache_home()) / "models"
    folders = [models / model.replace("/", "--"), Path(model)]
    if Path(model).is_dir():
        folders.append(models / Path(model).resolve().name)  # where pulling that folder put it
    for folder in folders:
        if (folder / BASE_JSON).is_file():
            return read_base(folder)
    message = f"There is no pulled model {model!r}: run `crma pull {model}` first."
    raise PullError(
        message, field="model", value=model, allowed=[str(folder) for folder in folders]
    )


def read_base(folder: Path, *, verify: bool = False) -> BaseModel:
    """Read the `base.json` of a pulled model; with `verify`, also compare every file with its digest.

    Raises PullError for a folder that was not pulled, or whose files have changed since.
    """
    again = f"Delete {folder} and pull the model again."
    try:
        content = json.loads((folder / BASE_JSON).read_text(encoding="utf-8"))
        base = BaseModel(content["name"], content["digest"], folder, dict(content["sources"]))
        files = dict(content["files"])
        if content_digest(base.sources) != base.digest:
            raise ValueError("its digest is not that of its sources")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"{folder / BASE_JSON} is damaged: {error}. {again}"
        raise PullError(message, field=BASE_JSON, value=str(folder)) from error
    for name, digest in files.items() if verify else ():
        found = file_digest(folder / name) if (folder / name).is_file() else "missing"
        if found != digest:
            raise PullError(
                f"{folder / name} is damaged. {again}", field=name, value=found, allowed=digest
            )
    return base
