"""What crosses between the ingress and a replica: a Call goes in, Parts come out."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Self

from crma.core.errors import CrmaError
from server.engine.request import EngineStats, Request, RequestOutput


@dataclass(frozen=True)
class Call:
    """A request on its way to a replica, whose clock is another one.

    Attributes:
        request: its times are those of the ingress.
        age_s: seconds since it arrived.
        left_s: seconds until its deadline; None: it has none.
        sizes: number of parameters of its adapters, as far as they are registered, by digest.
    """

    request: Request
    age_s: float
    left_s: float | None
    sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, sizes: Mapping[str, int]) -> Self:
        """A request that leaves now."""
        now = time.monotonic()
        left_s = None if request.deadline is None else request.deadline - now
        return cls(request, now - request.arrival, left_s, sizes)

    @property
    def adapters(self) -> frozenset[str]:
        """The digests that its request selects."""
        return frozenset(each for each in self.request.selection if each is not None)

    def received(self) -> Request:
        """The request, with times of this process's clock."""
        now = time.monotonic()
        deadline = None if self.left_s is None else now + self.left_s
        return replace(self.request, arrival=now - self.age_s, deadline=deadline)


@dataclass(frozen=True)
class Status:
    """A replica and its engine's state. `name` is unique in the life of an application."""

    name: str
    stats: EngineStats


@dataclass(frozen=True)
class Part:
    """A piece of what a replica answers to a call.

    Attributes:
        outputs: of the request; those of a whole answer come together, one for each sequence.
        error: what the engine raised. Nothing follows.
        status: after the last output.
    """

    outputs: tuple[RequestOutput, ...] = ()
    error: CrmaError | None = None
    status: Status | None = None


def joined(outputs: Sequence[RequestOutput]) -> tuple[RequestOutput, ...]:
    """All outputs of a request as one for each of its sequences."""
    by_index: dict[int, list[RequestOutput]] = {}
    for output in outputs:
        by_index.setdefault(output.index, []).append(output)
    return tuple(_joined(each) for each in by_index.values())


def _joined(parts: Sequence[RequestOutput]) -> RequestOutput:
    """The outputs of one sequence as one: the last has the totals."""
    return replace(
        parts[-1],
        token_ids=tuple(chain.from_iterable(part.token_ids for part in parts)),
        text="".join(part.text for part in parts),
        logprobs=tuple(chain.from_iterable(part.logprobs for part in parts)),
        prompt_logprobs=tuple(chain.from_iterable(part.prompt_logprobs for part in parts)),
    )
