"""server.engine.batch: what a step feeds the model."""

from __future__ import annotations

import torch

from crma.selection import AdapterSelection
from server.engine.batch import build_batch
from server.engine.request import Request
from server.engine.scheduler import Step
from server.engine.sequence import Sequence

SELECTIONS = (AdapterSelection("a"), AdapterSelection(None, "c"))


def sequences() -> tuple[Sequence, ...]:
    prompts = ((7, 8, 9), (5,))
    return tuple(
        Sequence(Request(str(i), prompt, selection=SELECTIONS[i]), 0, slot=3 - i) for i, prompt in enumerate(prompts)
    )


def test_prompts_are_padded_on_the_left_and_padding_has_no_position() -> None:
    batch = build_batch(Step(sequences(), is_prefill=True), torch.device("cpu"))
    assert batch.input_ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert batch.positions.tolist() == [[0, 1, 2], [-1, -1, 0]]
    assert (batch.slots.tolist(), batch.selections) == ([3, 2], SELECTIONS)


def test_a_decode_feeds_the_newest_token_at_the_place_after_all_others() -> None:
    rows = sequences()
    rows[0].token_ids += [11]
    rows[1].token_ids += [12, 13]
    batch = build_batch(Step(rows, is_prefill=False), torch.device("cpu"))
    assert (batch.input_ids.tolist(), batch.positions.tolist()) == ([[11], [13]], [[3], [2]])
