"""server.service.fair_queue: each owner gets its share of the work."""

from hypothesis import given
from hypothesis import strategies as st

from server.service.fair_queue import FairQueue

ITEMS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 100)), max_size=40)


def drained(queue: FairQueue[str]) -> list[str]:
    found = []
    while queue:
        item = queue.pop()
        assert item is not None
        found.append(item)
    return found


def test_a_small_item_waits_for_none_of_the_large_ones_of_another_owner() -> None:
    queue = FairQueue[str]()
    for number in range(20):
        queue.push("greedy", 1000, f"large {number}")
    queue.push("other", 1, "small")
    assert drained(queue)[0] == "small"


def test_owners_with_equal_items_take_turns_however_many_each_has() -> None:
    queue = FairQueue[str]()
    for _ in range(6):
        queue.push("a", 10, "a")
    assert queue.pop() == "a"
    for _ in range(3):
        queue.push("b", 10, "b")
    assert "".join(drained(queue)).startswith(("ababab", "bababa"))


def test_a_large_item_is_not_passed_over_for_ever() -> None:
    queue = FairQueue[str]()
    queue.push("patient", 100, "large")
    order = []
    for _ in range(30):
        queue.push("busy", 10, "small")
        order.append(queue.pop())
    assert 9 <= order.index("large") <= 11


def test_an_owner_that_has_been_idle_has_saved_up_nothing() -> None:
    queue = FairQueue[str]()
    for _ in range(100):
        queue.push("a", 10, "a")
        queue.pop()
    for _ in range(4):
        queue.push("a", 10, "a")
        queue.push("b", 10, "b")
    assert sorted(drained(queue)[:4]) == ["a", "a", "b", "b"]


def test_an_item_over_the_cost_stays_for_others() -> None:
    queue = FairQueue[str]()
    queue.push("a", 100, "large")
    queue.push("a", 10, "small")
    assert queue.pop(10) == "small"
    assert queue.pop(10) is None
    assert queue.pop() == "large"
    assert queue.pop() is None


def test_small_items_that_overtake_their_owners_large_ones_give_it_no_more_than_its_share() -> None:
    queue = FairQueue[str]()
    for _ in range(10):
        queue.push("greedy", 100, "greedy")
    queue.push("greedy", 1, "small")
    assert queue.pop(10) == "small"
    queue.push("other", 100, "other")
    assert "other" in drained(queue)[:2]


def test_an_item_that_was_never_taken_costs_its_owner_nothing() -> None:
    queue = FairQueue[str]()
    queue.push("other", 100, "first")
    assert queue.pop() == "first"
    for _ in range(5):
        queue.remove(queue.push("a", 1000, "refused"))
    early = queue.push("a", 1000, "given up")
    queue.push("a", 50, "a")
    queue.remove(early)
    queue.push("b", 60, "b")
    assert drained(queue) == ["a", "b"]


def test_the_greediest_is_another_owner_with_more_items() -> None:
    queue = FairQueue[str]()
    assert queue.newest_of_greediest("a") is None
    for number in range(3):
        queue.push("a", 1, f"a{number}")
    queue.push("b", 1, "b0")
    found = queue.newest_of_greediest("b")
    assert found is not None
    assert found.item == "a2"
    assert queue.newest_of_greediest("a") is None
    queue.push("b", 1, "b1")
    queue.push("b", 1, "b2")
    assert queue.newest_of_greediest("b") is None


@given(ITEMS)
def test_every_item_leaves_once_and_an_owners_equal_ones_in_order(
    items: list[tuple[str, int]],
) -> None:
    queue = FairQueue[int]()
    tickets = [queue.push(*item, number) for number, item in enumerate(items)]
    removed = {ticket.item for ticket in tickets[::3]}
    for ticket in tickets[::3]:
        queue.remove(ticket)
        queue.remove(ticket)
    left: list[int] = []
    while queue:
        item = queue.pop()
        assert item is not None
        left.append(item)
    assert sorted(left) == sorted(set(range(len(items))) - removed)
    for owner in "abc":
        own = [number for number in left if items[number][0] == owner]
        assert own == sorted(own)
    assert queue._last.keys() <= {owner for owner, _ in items}
