"""crma.evaluation.evaluator: losses and answers of batches equal those of single rows."""

import pytest
import torch
from tiny import injection, lora, tokenizer
from tiny_configs import FAMILIES

from crma.data.examples import Example
from crma.evaluation.evaluator import (
    Encoded,
    Evaluator,
    Measure,
    answer_logits,
    answer_loss,
    collate,
)
from crma.method.injection import Injection, Plan
from crma.models.prompts import chat_format
from crma.models.reference import generate

FORMAT = chat_format(tokenizer())
STOP = FORMAT.stop_id(tokenizer())
EXAMPLES = [Example(f"{'long ' * (i % 4)}{i}?", "yes" * (1 + i % 3)) for i in range(7)]
ROWS = Evaluator(injection(), tokenizer(), FORMAT).encode(EXAMPLES)


@torch.inference_mode()
def by_hand(inj: Injection, row: Encoded) -> float:
    """Return the summed negative log-likelihood of one answer: no padding, no hook, all logits."""
    ids = [*row.prompt, *row.answer]
    logprobs = inj.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    positions = range(len(row.prompt), len(ids))
    return -sum(logprobs[position - 1, ids[position]].item() for position in positions)


def greedy(inj: Injection, row: Encoded, plan: Plan, max_tokens: int) -> list[int]:
    """Return the oracle's greedy answer to one prompt, without the stop token."""
    generation = generate(inj, row.prompt, plan, max_tokens=max_tokens, stop_ids=[STOP])
    return list(generation.token_ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_padded_batch_is_the_sum_over_its_rows(family: str) -> None:
    inj = injection(family)
    expected = sum(by_hand(inj, row) for row in ROWS)
    batch = collate(ROWS, STOP)
    loss = answer_loss(answer_logits(inj.model, batch), batch).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert batch.num_tokens == sum(len(row.prompt) + len(row.answer) - 1 for row in ROWS)
    num_tokens = sum(len(row.answer) for row in ROWS)
    for batch_size in (1, 3, 50):
        evaluator = Evaluator(inj, tokenizer(), FORMAT, batch_size)
        loss = evaluator.measure(Plan(), ROWS).loss
        assert loss == pytest.approx(expected / num_tokens, rel=1e-5)


def test_a_batch_gives_the_answers_of_each_row_alone_and_follows_the_plan() -> None:
    inj = injection()
    evaluator = Evaluator(inj, tokenizer(), FORMAT, 3)
    prompts = [example.prompt for example in EXAMPLES]
    texts = []
    for plan in (Plan(), Plan(tasks=[(None, lora(inj, 4, "all-linear", seed=0))])):
        texts.append(evaluator.answers(plan, prompts, max_tokens=6))
        alone = [greedy(inj, row, plan, max_tokens=6) for row in ROWS]
        assert texts[-1] == [tokenizer().decode(ids, skip_special_tokens=True) for ids in alone]
    assert texts[0] != texts[1]


def test_an_answer_is_right_exactly_if_greedy_decoding_gives_it() -> None:
    inj = injection()
    rows = [Encoded(row.prompt, greedy(inj, row, Plan(), max_tokens=9)) for row in ROWS[:4]]
    right = rows[1].answer
    rows[1] = Encoded(rows[1].prompt, [*right[:-1], right[-1] ^ 1])  # another last token
    found = Evaluator(inj, tokenizer(), FORMAT, 3).measure(Plan(), rows)
    assert (found.items, found.accuracy) == (4, 0.75)
    assert found.wilson[0] < 0.75 < found.wilson[1]


def test_the_loss_of_every_row_is_its_own_whatever_batch_it_is_in() -> None:
    inj = injection()
    expected = [by_hand(inj, row) for row in ROWS]
    for batch_size in (1, 3, 50):
        evaluator = Evaluator(inj, tokenizer(), FORMAT, batch_size)
        items = evaluator.measure_items(Plan(), ROWS)
        assert [item.nats for item in items] == pytest.approx(expected, rel=1e-5)
        assert [item.num_tokens for item in items] == [len(row.answer) for row in ROWS]
        assert Measure.of(items) == evaluator.measure(Plan(), ROWS)
