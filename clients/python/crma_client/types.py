"""What the server answers to /generate, as frozen dataclasses, and the one reader that makes them from JSON.

What the server only reports is left as the JSON it sent: usage, timings and provenance of an answer, an ablation's
report, the listing of adapters. `/docs` of the server names every field of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from crma_client.errors import ProtocolError

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """One of the n answers. finish_reason: stop or length; logprobs: one per token, if asked for."""

    index: int
    finish_reason: str
    text: str = ""  # the event that ends a stream leaves it out: the tokens have brought it
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Generation:
    """The answer of /generate. `task` and `crma` are what the server resolved; `raw` is the whole JSON.

    usage: prompt_tokens, completion_tokens, cached_tokens (of the prompt, from the prefix cache).
    timings: queue_s, ttft_s, e2e_s: seconds from the request's arrival until scheduled, first token, end.
    provenance: exactly what produced it: base, task, crma (digests; None = not used), engine, dtype, seed.
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
        """The text of the first choice: the only one unless n > 1."""
        return self.choices[0].text

    @property
    def finish_reason(self) -> str:
        """The finish reason of the first choice."""
        return self.choices[0].finish_reason


@dataclass(frozen=True)
class Token:
    """New text of choice `index`; may be empty while the server holds back part of a character or stop string."""

    index: int
    text: str
    logprob: float | None = None


def read(cls: type[T], data: object) -> T:
    """JSON as an instance of `cls`, a dataclass of this module or `dict`. Keys this version does not know are left
    alone; raises ProtocolError that names the place where it is something else."""
    return _value(cls, data, cls.__name__)


def read_generation(data: object) -> Generation:
    """As `read`, for both forms of the answer: its one choice at the top, or a list of `choices`."""
    body = read(dict, data)
    choices = body.get("choices") or [{**body, "index": 0}]
    return read(Generation, {**body, "choices": choices, "raw": body})


_hints = cache(get_type_hints)


def _value(kind: Any, data: Any, where: str) -> Any:
    """`data` as `kind`: a dataclass, X | None, tuple of one type, or a plain type."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is UnionType:  # always X | None
        return None if data is None else _value(args[0], data, where)
    if origin is tuple:
        return tuple(
            _value(args[0], item, f"{where}[{i}]")
            for i, item in enumerate(_value(list, data, where))
        )
    if is_dataclass(
        kind
    ):  # a field that is not given has its default; without one it is None, or refused
        hints, given = _hints(origin), _value(dict, data, where)
        values = {name: given.get(name, getattr(origin, name, None)) for name in hints}
        return origin(
            **{
                name: _value(hints[name], value, f"{where}.{name}")
                for name, value in values.items()
            }
        )
    if not isinstance(data, (int, float) if kind is float else origin):
        name = origin.__name__
        raise ProtocolError(
            f"the answer has no {where} of type {name}", field=where, value=data, allowed=name
        )
    return data
