"""crma.models.reference: the end of an answer. For the rest it is the oracle of others."""

from tiny import injection

from crma.models.reference import Generation, generate


def test_a_stop_token_ends_it_and_is_no_part_of_it() -> None:
    free = generate(injection(), [3, 4, 5], max_tokens=6)
    first = free.token_ids.index(free.token_ids[3])
    stopped = generate(injection(), [3, 4, 5], max_tokens=6, stop_ids=[free.token_ids[3]])
    assert stopped == Generation(free.token_ids[:first], free.logprobs[:first], "stop")
