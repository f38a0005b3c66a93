"""Renders chat templates as transformers does, without importing it.

A template comes with a model or an adapter, so it is foreign code: it runs in Jinja's sandbox, with
the names that `transformers.utils.chat_template_utils` gives it, and no others.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

PARAMETERS = frozenset(  # of transformers' `apply_chat_template`
    {
        "conversation",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "kwargs",
    }
)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the first is what templates read


def render_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    documents: Sequence[Mapping[str, Any]] | None,
    generate: bool,
    variables: Mapping[str, Any],
) -> str:
    """The text that a template makes of a conversation.

    Args:
        messages: JSON objects. Keys whose value is None are left out.
        tools: schemas of functions.
        documents: JSON objects.
        generate: up to where the answer begins.
        variables: further ones, such as the names of special tokens.

    Raises:
        TypeError: a document is no object.
        Exception: whatever the template raises.
    """
    if not messages:
        raise ValueError("a chat template needs at least one message")
    if documents is not None and not all(isinstance(each, dict) for each in documents):
        raise TypeError("documents: each is an object with a title and a text")
    return _compiled(template).render(
        messages=[_readable(message) for message in messages],
        tools=None if tools is None else list(tools),
        documents=documents,
        add_generation_prompt=generate,
        **variables,
    )


def _readable(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message without empty keys, and with its reasoning under each name that templates use."""
    given = {key: value for key, value in message.items() if value is not None}
    reasoning = [given[key] for key in _REASONING if key in given]
    if not reasoning:
        return given
    return {"thinking": reasoning[0], **given, "reasoning_content": reasoning[0]}


@lru_cache(maxsize=64)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dictionary()
    environment.globals["namespace"] = _Namespace
    return environment.from_string(template)


class _Generation(Extension):
    """`{% generation %}`, which marks what an assistant wrote: here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_show"), [], [], body).set_lineno(line)

    def _show(self, caller: Macro) -> str:
        return caller()


class _Dictionary:
    """`dict` for templates: only what makes dictionaries, and no attribute of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` for templates: no attribute begins with an underscore, as Python's own do."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that an attribute may be named `self`
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


def _check_attribute(name: object) -> None:
    """Raises SecurityError if a template may not store it."""
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(
            f"chat templates cannot store attributes that begin with an underscore, such as {name}"
        )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape characters of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
