"""What transformers makes of a pulled model's files, recorded beside it.

A server needs its config, its rotary frequencies and its tokenizer as transformers loads them, and
whether its chat template serves. To import transformers' code for that takes a third of a start and
more memory than a small model's adapters. So transformers is asked once, by `crma pull` or the
first start, and the answers are kept in two hidden files that are no part of the model:
`.serving.json` and `.tokenizer.json`.

They follow from the model's files and from the versions of transformers and tokenizers. A record of
others is ignored and replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError
from tokenizers import Tokenizer

from crma.core.digests import bytes_digest, file_digest
from crma.core.errors import ConfigError
from crma.core.files import replace_record
from crma.models.base_model import BASE_JSON, BaseModel
from crma.models.plain_tokenizer import PlainTokenizer
from crma.models.prompts import check_template

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

RECORD = ".serving.json"
BACKEND = ".tokenizer.json"
LIBRARIES = ("transformers", "tokenizers")
STEADY_ROPES = ("default", "linear", "llama3", "yarn")  # whose frequencies no length changes
OWN_WAYS = (  # of encoding and decoding: a class that has others is no plain tokenizer
    "encode",
    "decode",
    "apply_chat_template",
    "convert_ids_to_tokens",
    "convert_tokens_to_ids",
    "_encode_plus",
    "_decode",
)


@dataclass(frozen=True)
class Frequencies:
    """Rotary frequencies that are scaled: one for each pair of a head's numbers, and a factor on
    cosines and sines."""

    values: Sequence[float]
    factor: float


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer's backend does not know; as in `PlainTokenizer`."""

    special_tokens_map: Mapping[str, str]
    all_special_tokens: Sequence[str]
    chat_template: str | Mapping[str, str] | None


@dataclass(frozen=True)
class Served:
    """What serving needs to know.

    Attributes:
        config: every field of the model's config, with transformers' defaults.
        frequencies: None: they are not scaled, or follow the length of a sequence.
        end_ids: the tokens that end an answer, as the generation config has them.
        tokenizer: None: it is of another kind, and stays with transformers.
        backend: digest of BACKEND; None without a tokenizer.
        chat_problem: why the chat template does not serve, in words; None: it does.
    """

    config: Mapping[str, Any]
    frequencies: Frequencies | None
    end_ids: int | Sequence[int] | None
    tokenizer: SpecialTokens | None
    backend: str | None
    chat_problem: str | None


@dataclass(frozen=True)
class _Record:
    """What is served, and what it was made from: digests of files, and versions of libraries."""

    files: Mapping[str, str]
    versions: Mapping[str, str]
    served: Served


_RECORD: TypeAdapter[_Record] = TypeAdapter(_Record)


def read_served(base: BaseModel) -> Served:
    """What serving needs to know of a pulled model.

    A folder that cannot be written is left as it is; transformers is then asked each time.

    Raises:
        OSError, ValueError: transformers cannot read the config.
    """
    files = _sources(base.path)
    versions = {name: version(name) for name in LIBRARIES}
    with suppress(OSError, ValidationError):
        found = _RECORD.validate_json((base.path / RECORD).read_bytes())
        if (found.files, found.versions) == (files, versions) and _is_whole(base, found.served):
            return found.served
    served, backend = _ask_transformers(base)
    with suppress(OSError):
        if backend is not None:
            replace_record(base.path / BACKEND, backend)
        replace_record(base.path / RECORD, _RECORD.dump_json(_Record(files, versions, served)))
    return served


def serving_tokenizer(
    base: BaseModel, served: Served | None = None
) -> PreTrainedTokenizerBase | PlainTokenizer:
    """The tokenizer of a pulled model, as a server needs it. Nothing is fetched.

    Args:
        served: what `read_served` found; None: it is read.
    """
    served = served or read_served(base)
    if served.tokenizer is not None:
        with suppress(OSError):  # a folder that cannot be written has none
            data = (base.path / BACKEND).read_bytes()
            if bytes_digest(data) == served.backend:
                return _plain(served.tokenizer, Tokenizer.from_buffer(data))
    return _plainest(_transformers_tokenizer(base))


def _is_whole(base: BaseModel, served: Served) -> bool:
    """Whether the tokenizer's file is the recorded one. Raises OSError if there is none."""
    return served.backend is None or file_digest(base.path / BACKEND) == served.backend


def _sources(folder: Path) -> dict[str, str]:
    """The digests of the files that a config and a tokenizer may be read from."""
    return {
        path.name: file_digest(path)
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.suffix != ".safetensors"
        and path.name != BASE_JSON
    }


def _ask_transformers(base: BaseModel) -> tuple[Served, bytes | None]:
    """What to record, and the content of BACKEND."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.path, local_files_only=True)
    tokenizer = _readable_tokenizer(base)
    special, backend = None, None
    if tokenizer is not None and _is_plain(tokenizer):
        special = _special_tokens(tokenizer)
        backend = tokenizer.backend_tokenizer.to_str().encode()
    served = Served(
        config=json.loads(config.to_json_string(use_diff=False)),
        frequencies=_frequencies(config),
        end_ids=_end_ids(base, config),
        tokenizer=special,
        backend=None if backend is None else bytes_digest(backend),
        chat_problem=_chat_problem(tokenizer),
    )
    return served, backend


def _frequencies(config: PreTrainedConfig) -> Frequencies | None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind == "default" or kind not in STEADY_ROPES:
        return None
    values, factor = ROPE_INIT_FUNCTIONS[kind](config)
    return Frequencies(values.tolist(), float(factor))


def _end_ids(base: BaseModel, config: PreTrainedConfig) -> int | list[int] | None:
    from transformers import GenerationConfig

    try:
        generation = GenerationConfig.from_pretrained(base.path, local_files_only=True)
    except OSError:  # the model has none
        generation = GenerationConfig.from_model_config(config)
    return generation.eos_token_id


def _readable_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase | None:
    """The tokenizer; None if there is none that can be read."""
    try:
        return _transformers_tokenizer(base)
    except Exception:  # transformers raises many kinds; whoever needs the tokenizer gets to see it
        return None


def _chat_problem(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    if tokenizer is None:
        return "the base model has no tokenizer that can be read"
    try:
        check_template(tokenizer, None)
    except ConfigError as error:
        return error.message
    return None


def _transformers_tokenizer(base: BaseModel) -> PreTrainedTokenizerBase:
    from crma.models.loading import load_tokenizer

    return load_tokenizer(base)


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it encodes and decodes as transformers' general class does."""
    from transformers import TokenizersBackend

    if not isinstance(tokenizer, TokenizersBackend) or tokenizer.split_special_tokens:
        return False
    kind = type(tokenizer)
    return all(getattr(kind, name) is getattr(TokenizersBackend, name) for name in OWN_WAYS)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    return SpecialTokens(
        tokenizer.special_tokens_map, tokenizer.all_special_tokens, tokenizer.chat_template
    )


def _plainest(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase | PlainTokenizer:
    """transformers' tokenizer, or a plain one in its place."""
    if not _is_plain(tokenizer):
        return tokenizer
    return _plain(_special_tokens(tokenizer), tokenizer.backend_tokenizer)


def _plain(special: SpecialTokens, backend: Tokenizer) -> PlainTokenizer:
    backend.no_padding()
    backend.no_truncation()
    return PlainTokenizer(
        backend,
        special.special_tokens_map,
        special.all_special_tokens,
        special.chat_template,
    )
