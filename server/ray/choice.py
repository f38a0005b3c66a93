"""Which replica a request goes to. Plain data: no Ray."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Candidate:
    """A replica that could take a request.

    Attributes:
        name: of the replica.
        num_open: requests that it has and that have not ended.
        num_sent: requests that it has had.
        warm: digests of the adapters in its memory, or on their way there.
    """

    name: str
    num_open: int = 0
    num_sent: int = 0
    warm: Collection[str] = field(default=frozenset())


def by_preference(
    candidates: Iterable[Candidate], adapters: Collection[str], max_lead: int
) -> list[Candidate]:
    """The candidates, best first.

    First come those that have all of the adapters in memory, then who has the fewest open requests.
    Of equals, a request with adapters goes to who has the fewest in memory, so that they spread. A
    replica that has far more open requests than another comes after those that have not: an
    adapter in much demand gets a second replica.

    Args:
        adapters: digests that the request needs.
        max_lead: how many more open requests than the least loaded a replica may have and still be
            preferred for its adapters.
    """
    found = list(candidates)
    least = min((each.num_open for each in found), default=0)

    def rank(each: Candidate) -> tuple[bool, bool, int, int, int]:
        is_cold = any(digest not in each.warm for digest in adapters)
        is_behind = each.num_open > least + max_lead
        num_warm = len(each.warm) if adapters else 0
        return is_behind, is_cold, each.num_open, num_warm, each.num_sent

    return sorted(found, key=rank)
