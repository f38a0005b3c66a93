"""server.engine.kv_cache: what was written is what is read, and nothing else is ever seen."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.kv_cache import KvCache, attention_mask

HEADS, SIZE = 2, 3
advance = st.tuples(st.booleans(), st.sampled_from([1, 1, 3, 130]))  # from the start again?, new tokens


def positions(rows: list[tuple[int, int]]) -> torch.Tensor:
    """(start, count) of each row -> [b, s], left-padded with -1."""
    width = max(count for _, count in rows)
    return torch.tensor([[-1] * (width - n) + list(range(start, start + n)) for start, n in rows])


def write(cache: KvCache, slots: list[int], where: torch.Tensor, generator: torch.Generator) -> list[torch.Tensor]:
    """Random keys and values (layer 1's are the negative of layer 0's); returns new, and what is read of layer 0."""
    new = torch.randn(2, len(slots), HEADS, where.shape[1], SIZE, generator=generator)
    view = cache.view(torch.tensor(slots), where)
    keys, values = view.update(new[0], new[1], 0)
    other, _ = view.update(-new[0], -new[1], 1)
    assert torch.equal(keys, -other), "layers are mixed up"
    assert keys.shape == (len(slots), HEADS, int(where.max()) + 1, SIZE)
    return [new, torch.stack([keys, values])]


@settings(derandomize=True, max_examples=40, deadline=None)
@given(steps=st.lists(st.dictionaries(st.integers(0, 2), advance, min_size=1), min_size=1, max_size=8))
def test_every_slot_reads_back_what_was_written_to_it_as_it_grows(steps: list[dict[int, tuple[bool, int]]]) -> None:
    """Slots advance by different counts, padded against each other, and some start anew where another sequence was."""
    cache, generator = KvCache(3), torch.Generator().manual_seed(0)
    written = {slot: torch.zeros(2, HEADS, 0, SIZE) for slot in range(3)}
    for step in steps:
        slots = list(step)
        for slot, (anew, _) in step.items():
            written[slot] = written[slot][:, :, :0] if anew else written[slot]
        where = positions([(written[slot].shape[2], count) for slot, (_, count) in step.items()])
        new, read = write(cache, slots, where, generator)
        for row, (slot, (_, count)) in enumerate(step.items()):
            written[slot] = torch.cat([written[slot], new[:, row, :, -count:]], dim=2)
            assert torch.equal(read[:, row, :, : written[slot].shape[2]], written[slot])


def test_a_cleared_slot_holds_numbers_and_the_others_what_they_held() -> None:
    cache, generator = KvCache(2), torch.Generator().manual_seed(0)
    new, _ = write(cache, [0, 1], positions([(0, 6), (0, 6)]), generator)
    cache.layer(0, new[0], 6)[1][1] = torch.nan
    cache.clear([1])
    _, read = write(cache, [0, 1], positions([(6, 1), (0, 1)]), generator)
    assert torch.equal(read[:, 0, :, :6], new[:, 0])
    assert torch.equal(read[:, 1, :, 1:], torch.zeros(2, HEADS, 6, SIZE))


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), min_size=1, max_size=4),
    window=st.one_of(st.none(), st.integers(1, 6)),
)
def test_a_token_sees_what_the_definition_says(rows: list[tuple[int, int]], window: int | None) -> None:
    where = positions(rows)
    size = int(where.max()) + 1
    mask = attention_mask(where, size, window)
    assert mask.shape == (*where.shape[:1], 1, where.shape[1], size)
    for row, own in zip(mask[:, 0].flatten(0, 1), where.flatten().tolist(), strict=True):
        own = max(own, 0)
        assert row.tolist() == [p <= own and (window is None or own - p < window) for p in range(size)]
