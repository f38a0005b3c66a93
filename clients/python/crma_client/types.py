"""What the server answers, as frozen dataclasses, and the one reader that makes them from JSON.

Keys this version does not know are left alone; top-level answers keep the whole JSON in `raw`. Digests are
"sha256:<64 hex>", times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cache
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from crma_client.errors import ProtocolError

T = TypeVar("T")


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
    finish_reason: str
    text: str = ""  # the event that ends a stream leaves it out: the tokens have brought it
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
class AblationReport:
    """The answer of /ablation. `question_set` holds its name, digest and number of items.

    An item is {"id", "task", "answers", "outputs"}: a question and, by variant, {"text", "correct"}, or why there is no
    answer.
    """

    id: str
    question_set: Mapping[str, Any]
    scorer: str
    variants: Mapping[str, VariantScore]
    comparisons: tuple[Comparison, ...]
    items: tuple[Mapping[str, Any], ...]
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
    return _value(cls, data, cls.__name__)


def read_generation(data: object) -> Generation:
    """As `read`, for both forms of the answer: its one choice at the top, or a list of `choices`."""
    body = _value(dict, data, "Generation")
    choices = body.get("choices") or [{**body, "index": 0}]
    return replace(read(Generation, {**body, "choices": choices}), raw=body)


_hints = cache(get_type_hints)


def _value(kind: Any, data: Any, where: str) -> Any:
    """`data` as `kind`: a dataclass, X | None, tuple of one type, Mapping, Any, or a plain type."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:  # always X | None
        return None if data is None else _value(args[0], data, where)
    if origin is tuple:
        return tuple(_value(args[0], item, f"{where}[{i}]") for i, item in enumerate(_value(list, data, where)))
    if origin is Mapping:
        return {key: _value(args[1], item, f"{where}.{key}") for key, item in _value(dict, data, where).items()}
    if is_dataclass(kind):
        return _instance(kind, {**_value(dict, data, where), "raw": data}, where)
    if kind is not Any and not isinstance(data, (int, float) if kind is float else kind):
        name = kind.__name__
        raise ProtocolError(f"the answer has no {where} of type {name}", field=where, value=data, allowed=name)
    return data


def _instance(cls: Any, given: dict[str, Any], where: str) -> Any:
    """A `cls` of what was given. A field that was not has its default; without one it is None, or refused."""
    values = {name: given.get(name, getattr(cls, name, None)) for name in _hints(cls)}
    return cls(**{name: _value(_hints(cls)[name], value, f"{where}.{name}") for name, value in values.items()})
