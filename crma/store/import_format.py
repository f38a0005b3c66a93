"""An adapter from elsewhere: its prompt format, and whether its tokenizer is the base model's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crma.core.errors import ConfigError
from crma.core.files import invalid, parse_json, read_regular
from crma.models.base_model import BaseModel
from crma.models.prompts import BASE_TEMPLATE, RAW_FORMAT, Format, TemplateFormat, check_template

FORMATS = ("raw", "chat", "template")
TEMPLATE = "chat_template.jinja"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY = "vocab.json"
ADDED_TOKENS = "added_tokens.json"
TOKENIZER_FILES = (TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, VOCABULARY, ADDED_TOKENS)
"""The files of an adapter's folder that this module reads, where they are there."""

_MAX_TOKENIZER_BYTES = 128 * 2**20
_MAX_TEMPLATE_BYTES = 2**20
_NUM_SHOWN = 5


def import_format(folder: Path, base: BaseModel, name: str | None = None) -> Format:
    """The prompt format of an adapter that is imported.

    Args:
        folder: the adapter's.
        base: the base model that it was made for.
        name: "raw": no markup; "chat": the base model's chat template; "template": the adapter's
            own. None: the adapter's own if it has one, otherwise that of the base model if it has
            one, otherwise raw.

    Raises:
        ConfigError: another name, or the template that it needs is missing.
        InvalidAdapter: the adapter's template cannot render one user turn, or a file is malformed.
    """
    if name not in (None, *FORMATS):
        message = f"prompt_format: there is no {name!r}"
        raise ConfigError(message, field="prompt_format", value=name, allowed=FORMATS)
    own = _template_in(folder)
    of_base = _template_in(base.path)
    if name is None:
        name = "template" if own else "chat" if of_base else "raw"
    if name == "raw":
        return RAW_FORMAT
    if name == "chat":
        _check_there_is(of_base, name, f"the base model {base.name}")
        return BASE_TEMPLATE
    _check_there_is(own, name, "the adapter's folder")
    return _own_format(str(own), folder, base)


def describe(prompt_format: Format | None) -> str:
    """A prompt format in the words of `crma store import --prompt-format`."""
    if isinstance(prompt_format, TemplateFormat):
        if prompt_format.template is None:
            return "chat: the base model's chat template"
        return "template: the adapter's own chat template"
    return "raw: no markup" if prompt_format == RAW_FORMAT else "as recorded"


def check_vocabulary(folder: Path, base: BaseModel) -> None:
    """Whether every token of an adapter's tokenizer, if it has one, is that of the base model.

    Raises InvalidAdapter that names the first tokens that differ, or a malformed file.
    """
    own = _tokens_in(folder)
    if not own:
        return
    known = _tokens_in(base.path)
    differ = [token for token, token_id in own.items() if known.get(token) != token_id]
    if known and differ:
        shown = {token: own[token] for token in differ[:_NUM_SHOWN]}
        names = ", ".join(map(repr, shown))
        message = (
            f"Its tokenizer is not the base model's: they differ in {len(differ)} tokens, from "
            f"{names}. If the adapter does without them, remove the tokenizer's files."
        )
        allowed = f"the vocabulary of {base.name}"
        raise invalid(message, TOKENIZER, shown, allowed)


def _check_there_is(template: str | None, name: str, place: str) -> None:
    if template is None:
        message = f"prompt_format {name!r}: {place} has no chat template"
        raise ConfigError(message, field="prompt_format", value=name, allowed=FORMATS)


def _own_format(template: str, folder: Path, base: BaseModel) -> TemplateFormat:
    """The adapter's template, which sees the adapter's own start and end tokens.

    Raises InvalidAdapter if it cannot render one user turn.
    """
    from crma.models.loading import load_tokenizer

    own, of_base = _config_in(folder), _config_in(base.path)
    for role in ("bos_token", "eos_token"):
        token = _text_of(own.get(role))
        if token and token != _text_of(of_base.get(role)):
            template = f"{{% set {role} = {json.dumps(token)} %}}{template}"
    try:
        check_template(load_tokenizer(base), template)
    except ConfigError as error:
        raise invalid(f"{error.message}.", TEMPLATE, template, "a chat template") from error
    return TemplateFormat(template)


def _template_in(folder: Path) -> str | None:
    """The chat template of a tokenizer's folder."""
    path = folder / TEMPLATE
    if path.exists():
        try:
            return read_regular(path.resolve(), _MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise invalid(f"Not UTF-8: {error}.", TEMPLATE, str(path), "UTF-8") from error
    found = _config_in(folder).get("chat_template")
    if isinstance(found, list):  # of named templates
        with _well_formed(TOKENIZER_CONFIG):
            named = {each["name"]: each["template"] for each in found}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _tokens_in(folder: Path) -> dict[str, int]:
    """Every token that the tokenizer's files in a folder list, with its id.

    Raises InvalidAdapter for a malformed file.
    """
    tokenizer = _json_in(folder, TOKENIZER)
    with _well_formed(TOKENIZER):
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # of [token, score]
            vocabulary = {token: i for i, (token, _) in enumerate(vocabulary)}
        added = {each["content"]: each["id"] for each in tokenizer.get("added_tokens", [])}
    with _well_formed(TOKENIZER_CONFIG):
        listed = _config_in(folder).get("added_tokens_decoder", {})
        decoded = {each["content"]: int(token_id) for token_id, each in listed.items()}
    plain = _json_in(folder, VOCABULARY) | _json_in(folder, ADDED_TOKENS)
    return {**plain, **vocabulary, **decoded, **added}


@contextmanager
def _well_formed(name: str) -> Iterator[None]:
    """Raises InvalidAdapter if the block finds a file to be other JSON than a tokenizer writes."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        allowed = "the file of a tokenizer"
        raise invalid("Not as a tokenizer writes it.", name, reason, allowed) from error


def _config_in(folder: Path) -> dict[str, Any]:
    return _json_in(folder, TOKENIZER_CONFIG)


def _json_in(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a folder; empty if there is no such file. Raises InvalidAdapter."""
    path = folder / name
    if not path.exists():
        return {}
    return parse_json(read_regular(path.resolve(), _MAX_TOKENIZER_BYTES), name)


def _text_of(token: Any) -> str | None:
    """The text of a special token, which some files write with its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
