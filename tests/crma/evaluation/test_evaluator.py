"""crma.evaluation.evaluator: losses and answers, against values computed by hand and row by row."""

import pytest
import torch
from tiny import FAMILIES, injection, lora, tokenizer

from crma.data.examples import Example
from crma.evaluation.evaluator import Encoded, Evaluator, answer_logits, answer_loss, collate
from crma.method.injection import Injection, Plan
from crma.models.prompts import chat_format
from crma.models.reference import generate

FORMAT = chat_format(tokenizer())
STOP = FORMAT.stop_id(tokenizer())
EXAMPLES = [Example(f"{'long ' * (i % 4)}{i}?", "yes" * (1 + i % 3)) for i in range(7)]
ROWS = Evaluator(injection(), tokenizer(), FORMAT).encode(EXAMPLES)


@torch.inference_mode()
def by_hand(inj: Injection, row: Encoded) -> float:
    """Summed negative log-likelihood of one answer: no padding, no hook, all logits."""
    ids = [*row.prompt, *row.answer]
    logprobs = inj.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(logprobs[at - 1, ids[at]].item() for at in range(len(row.prompt), len(ids)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(family: str) -> None:
    inj = injection(family)
    expected = [by_hand(inj, row) for row in ROWS]
    batch = collate(ROWS, STOP)
    assert answer_loss(answer_logits(inj.model, batch), batch).item() == pytest.approx(
        sum(expected), rel=1e-5
    )
    assert batch.num_tokens == sum(len(row.prompt) + len(row.answer) - 1 for row in ROWS)
    tokens = sum(len(row.answer) for row in ROWS)
    for batch_size in (1, 3, 50):
        evaluator = Evaluator(inj, tokenizer(), FORMAT, batch_size)
        assert evaluator.measure(Plan(), ROWS).loss == pytest.approx(
            sum(expected) / tokens, rel=1e-5
        )


def test_answers_of_a_batch_are_those_of_each_row_alone_and_follow_the_plan() -> None:
    inj = injection()
    texts = []
    for plan in (Plan(), Plan(tasks=[(None, lora(inj, 4, "all-linear", seed=0))])):
        evaluator = Evaluator(inj, tokenizer(), FORMAT, 3)
        texts.append(
            evaluator.answers(plan, [example.prompt for example in EXAMPLES], max_tokens=6)
        )
        alone = [
            generate(inj, row.prompt, plan, max_tokens=6, stop_ids=[STOP]).token_ids for row in ROWS
        ]
        assert texts[-1] == [tokenizer().decode(ids, skip_special_tokens=True) for ids in alone]
    assert texts[0] != texts[1]


def test_an_answer_counts_as_right_exactly_if_greedy_decoding_gives_it() -> None:
    inj = injection()
    own = [
        generate(inj, row.prompt, Plan(), max_tokens=9, stop_ids=[STOP]).token_ids
        for row in ROWS[:4]
    ]
    rows = [Encoded(row.prompt, list(ids)) for row, ids in zip(ROWS, own, strict=False)]
    rows[1] = Encoded(
        rows[1].prompt, [*rows[1].answer[:-1], rows[1].answer[-1] ^ 1]
    )  # its last token is another
    found = Evaluator(inj, tokenizer(), FORMAT, 3).measure(Plan(), rows)
    assert (found.items, found.accuracy) == (4, 0.75)
    assert found.wilson[0] < 0.75 < found.wilson[1]
