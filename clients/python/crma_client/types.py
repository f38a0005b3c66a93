"""What the server answers, as frozen dataclasses, and the one reader that makes them from JSON.

Keys this version does not know are left alone; top-level answers keep the whole JSON in `raw`. Digests are
"sha256:<64 hex>", times are seconds.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

from crma_client.errors import ProtocolError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds from the request's arrival at the server: until scheduled, first token, end."""

    queue_s: float
    ttft_s: float | None
    e2e_s: float


@dataclass(frozen=True)
class Provenance:
    """Exactly what produced an answer: digests (None = not used), engine version, dtype and seed."""

    base: str
    task: str | None
    crma: str | None
    engine: str
    dtype: str
    seed: int | None


@dataclass(frozen=True)
class Choice:
    """One of the n answers. finish_reason: stop or length; logprobs: one per token, if asked for."""

    index: int
    text: str
    finish_reason: str
    logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Generation:
    """The answer of /generate. `task` and `crma` are what the server resolved."""

    id: str
    choices: tuple[Choice, ...]
    task: str | None
    crma: bool
    usage: Usage
    timings: Timings
    provenance: Provenance
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


@dataclass(frozen=True)
class Question:
    """One question of an ablation; any of `answers` is right."""

    id: str
    task: str
    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Counts over some items. Failed and timed-out ones are counted apart and never scored; None: nothing was."""

    correct: int
    scored: int
    failed: int
    timed_out: int
    accuracy: float | None
    wilson: tuple[float, float] | None


@dataclass(frozen=True)
class VariantScore(Score):
    """One variant over all items, and over those of each task."""

    by_task: Mapping[str, Score]


@dataclass(frozen=True)
class McNemar:
    """Items that only a got right, items that only b got right, and McNemar's p value."""

    gained: int
    lost: int
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """Variant `a` against `b` over the items that both scored: difference of accuracies with its interval."""

    a: str
    b: str
    difference: float | None
    bootstrap: tuple[float, float] | None
    mcnemar: McNemar
    equivalent_within_margin: bool | None


@dataclass(frozen=True)
class AblationItem:
    """One question and, per variant, {"text", "correct"}, or why there is no answer."""

    id: str
    task: str
    answers: tuple[str, ...]
    outputs: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class AblationReport:
    """The answer of /ablation. `question_set` holds its name, digest and number of items."""

    id: str
    question_set: Mapping[str, Any]
    scorer: str
    variants: Mapping[str, VariantScore]
    comparisons: tuple[Comparison, ...]
    items: tuple[AblationItem, ...]
    provenance: Mapping[str, Any]
    wall_s: float
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Backbone:
    """The serving CRMA backbone and the certificate of its norm bounds."""

    version: str
    digest: str
    certificate: Mapping[str, Any]


@dataclass(frozen=True)
class TaskAdapter:
    """A task's serving version. `lineage`: digest of the backbone it was trained on, None: it never saw one.
    `resident`: its weights are in memory now."""

    name: str
    version: str
    digest: str
    rank: int
    scaling: float
    target_modules: tuple[str, ...]
    lineage: str | None
    measured: Mapping[str, Any]
    resident: bool


@dataclass(frozen=True)
class AdapterListing:
    """The answer of /adapters: the base model, the backbone if one is loaded, and the task adapters."""

    base: Mapping[str, Any]
    backbone: Backbone | None
    tasks: tuple[TaskAdapter, ...]
    raw: Mapping[str, Any] = field(repr=False)


def read(cls: type[T], data: object) -> T:
    """JSON as an instance of dataclass `cls`; raises ProtocolError that names the place where it is something else."""
    answer: T = _value(cls, data, cls.__name__)
    return answer


def read_generation(data: object) -> Generation:
    """As `read`, for both forms of the answer: its one choice at the top, or a list of `choices`."""
    body = expect(Mapping, data, "Generation")
    choices = body.get("choices") or [{**body, "index": 0}]
    return dataclasses.replace(read(Generation, {**body, "choices": choices}), raw=body)


_hints = lru_cache(maxsize=None)(get_type_hints)


def _value(kind: Any, data: object, where: str) -> Any:
    """`data` as `kind`: a dataclass, X | None, tuple, Mapping, Any, or a plain type."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin is types.UnionType:  # always X | None
        return None if data is None else _value(args[0], data, where)
    if dataclasses.is_dataclass(kind):
        return _instance(kind, expect(Mapping, data, where), where)
    if origin is tuple:
        items = expect(list, data, where)
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        if len(kinds) != len(items):
            raise ProtocolError(f"{where} does not hold {len(kinds)} values", field=where, value=data)
        return tuple(
            _value(each, item, f"{where}[{i}]") for i, (each, item) in enumerate(zip(kinds, items, strict=True))
        )
    if origin is Mapping:
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in expect(Mapping, data, where).items()}
    if kind in (int, float) and isinstance(data, bool):
        raise ProtocolError(f"{where} is not a number", field=where, value=data)
    return expect((int, float) if kind is float else kind, data, where)


def _instance(cls: Any, data: Mapping[str, Any], where: str) -> Any:
    values = {**data, "raw": data}
    found = {}
    for item in dataclasses.fields(cls):
        if item.name in values:
            found[item.name] = _value(_hints(cls)[item.name], values[item.name], f"{where}.{item.name}")
        elif item.default is dataclasses.MISSING:
            raise ProtocolError(f"{where} lacks {item.name}", field=f"{where}.{item.name}", value=data)
    return cls(**found)


def expect(kind: Any, data: object, where: str) -> Any:
    """`data`, or ProtocolError if it is no `kind`."""
    if not isinstance(data, kind):
        raise ProtocolError(f"{where} of the answer has the wrong type", field=where, value=data, allowed=str(kind))
    return data
