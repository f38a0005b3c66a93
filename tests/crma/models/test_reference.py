"""crma.models.reference: a stop token ends an answer. Every engine test relies on the rest."""

from tiny import injection

from crma.models.reference import Generation, generate


def test_a_stop_token_ends_the_answer_and_is_no_part_of_it() -> None:
    free = generate(injection(), [3, 4, 5], max_tokens=6)
    stop = free.token_ids[3]
    first = free.token_ids.index(stop)
    stopped = generate(injection(), [3, 4, 5], max_tokens=6, stop_ids=[stop])
    assert stopped == Generation(free.token_ids[:first], free.logprobs[:first], "stop")
