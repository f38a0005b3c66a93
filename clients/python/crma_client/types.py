"""The answers of POST /generate as frozen dataclasses, and the reader that builds them from JSON.

Parts that the server only reports stay plain JSON: usage, timings and provenance of an answer, the
report of an ablation, the list of adapters. The server documents their fields at `/docs`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from crma_client.errors import ProtocolError

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One of the n answers to a prompt.

    Args:
        index: position among the n answers.
        finish_reason: "stop" or "length".
        text: the generated text. The event that ends a stream omits it: the tokens carried it.
        logprobs: log-probability of each token, if requested.
    """

    index: int
    finish_reason: str
    text: str = ""
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Generation:
    """A complete answer of POST /generate.

    Args:
        id: the server's name for the request.
        choices: the n answers.
        task: the task adapter that the server resolved; None for the base model.
        crma: whether the CRMA backbone was on.
        usage: prompt_tokens, completion_tokens, and cached_tokens (prompt tokens that came from the
            prefix cache).
        timings: queue_s, ttft_s and e2e_s: seconds from the arrival of the request until it was
            scheduled, gave its first token, and ended.
        provenance: what produced the answer: digests of base, task and crma (None if not used),
            engine, dtype, seed.
        raw: the whole answer as JSON, with any field that this version does not know.
    """

    id: str
    choices: tuple[Choice, ...]
    task: str | None
    crma: bool
    usage: Mapping[str, Any]
    timings: Mapping[str, Any]
    provenance: Mapping[str, Any]
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def text(self) -> str:
        """The text of the first choice, which is the only one unless n > 1."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str:
        """The finish reason of the first choice."""
        return self.choices[0].finish_reason


@dataclass(frozen=True)
class Token:
    """New text of one choice of a streamed answer.

    Args:
        index: the choice it belongs to.
        text: empty while the server holds back part of a character or of a stop string.
        logprob: log-probability of the token, if requested.
    """

    index: int
    text: str
    logprob: float | None = None


def read(cls: type[T], data: object) -> T:
    """Check that JSON has the shape of `cls` and return it as an instance.

    Args:
        cls: a dataclass of this module, `dict` or `list`.
        data: decoded JSON. Keys that `cls` does not have are ignored.

    Raises:
        ProtocolError: a value has the wrong type; `field` is its path in the answer.
    """
    return _read_value(cls, data, cls.__name__)


def read_json(text: str | bytes) -> object:
    """Decode JSON; raises ProtocolError if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter: nested too deep
        raise ProtocolError(f"the answer is not JSON: {error}", value=text[:200]) from error


def read_generation(data: object) -> Generation:
    """Read an answer of POST /generate in either of its forms.

    With n > 1 the answer has a list of `choices`; otherwise its only choice is at the top level.

    Raises:
        ProtocolError: the JSON is not such an answer.
    """
    body = read(dict, data)
    choices = body.get("choices") or [{**body, "index": 0}]
    return read(Generation, {**body, "choices": choices, "raw": body})


_type_hints = cache(get_type_hints)


def _read_value(kind: Any, data: Any, path: str) -> Any:
    """Read `data`, found at `path`, as `kind`: X | None, tuple[X, ...], a dataclass or a class."""
    origin = get_origin(kind) or kind
    if origin is UnionType:  # always X | None
        inner = get_args(kind)[0]
        return None if data is None else _read_value(inner, data, path)
    if origin is tuple:
        item_kind = get_args(kind)[0]
        items = _read_value(list, data, path)
        return tuple(_read_value(item_kind, item, f"{path}[{i}]") for i, item in enumerate(items))
    if is_dataclass(kind):
        return _read_dataclass(origin, data, path)
    accepted = (int, float) if kind is float else origin
    if not isinstance(data, accepted):
        name = origin.__name__
        message = f"the answer should have a {name} at {path}, not {data!r:.100}"
        raise ProtocolError(message, field=path, value=data, allowed=name)
    return data


def _read_dataclass(cls: Any, data: Any, path: str) -> Any:
    """Read an object as `cls`. An absent key takes the field's default, or is read as None."""
    given = _read_value(dict, data, path)
    fields = {}
    for name, kind in _type_hints(cls).items():
        value = given.get(name, getattr(cls, name, None))
        fields[name] = _read_value(kind, value, f"{path}.{name}")
    return cls(**fields)
