"""server.engine.batch: what a step feeds the model."""

from __future__ import annotations

import torch

from crma.selection import AdapterSelection
from server.engine.batch import build_batch
from server.engine.request import Request
from server.engine.scheduler import Step
from server.engine.sequence import Sequence


def test_prompts_are_padded_on_the_left_and_a_decode_feeds_the_newest_token_after_all_others() -> None:
    long, short = Request("a", (7, 8, 9), selection=AdapterSelection("a")), Request("b", (5,))
    rows = (Sequence(long, 0, [], 3), Sequence(short, 0, [], 2))
    batch = build_batch(Step(rows, is_prefill=True), torch.device("cpu"))
    assert batch.input_ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert batch.positions.tolist() == [[0, 1, 2], [-1, -1, 0]], "padding has no position"
    assert (batch.slots.tolist(), batch.selections) == ([3, 2], (long.selection, short.selection))
    rows[0].token_ids += [11]
    rows[1].token_ids += [12, 13]
    batch = build_batch(Step(rows, is_prefill=False), torch.device("cpu"))
    assert (batch.input_ids.tolist(), batch.positions.tolist()) == ([[11], [13]], [[3], [2]])
