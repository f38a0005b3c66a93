"""crma.evaluate: losses and answers, against values computed by hand and row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from tiny import FAMILIES, VOCAB, injection, lora, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from crma.data import Example
from crma.evaluate import Encoded, answer_loss, collate, encode_examples, greedy_answers, mean_loss, measure
from crma.generate import generate
from crma.injection import Injection, Plan
from crma.prompts import chat_format

FORMAT = chat_format(tokenizer())
STOP = FORMAT.stop_id(tokenizer())
EXAMPLES = [Example(f"{'long ' * (i % 4)}{i}?", "yes" * (1 + i % 3)) for i in range(7)]
ROWS = encode_examples(tokenizer(), FORMAT, EXAMPLES)


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
    assert answer_loss(inj.model, batch).item() == pytest.approx(sum(expected), rel=1e-5)
    assert batch.num_tokens == sum(len(row.prompt) + len(row.answer) - 1 for row in ROWS)
    tokens = sum(len(row.answer) for row in ROWS)
    for batch_size in (1, 3, 50):
        assert mean_loss(inj, Plan(), ROWS, STOP, batch_size) == pytest.approx(sum(expected) / tokens, rel=1e-5)


def test_answers_of_a_batch_are_those_of_each_row_alone_and_follow_the_plan() -> None:
    inj = injection()
    texts = []
    for plan in (Plan(), Plan(tasks=[(None, lora(inj, 4, "all-linear", seed=0))])):
        texts.append(greedy_answers(inj, plan, tokenizer(), ROWS, STOP, max_tokens=6, batch_size=3))
        alone = [generate(inj, row.prompt, plan, max_tokens=6, stop_ids=[STOP]).token_ids for row in ROWS]
        assert texts[-1] == [tokenizer().decode(ids, skip_special_tokens=True) for ids in alone]
    assert texts[0] != texts[1]


def rigged(chain: Sequence[int], scale: float) -> Injection:
    """A Llama whose next token depends on the last one only: logit `scale` on its successor in `chain`, 0 elsewhere."""
    size = len(tokenizer())
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"](hidden_size=512, tie_word_embeddings=False)).eval()
    for name, parameter in model.requires_grad_(False).named_parameters():
        if "norm" not in name:
            nn.init.zeros_(parameter)
    model.get_input_embeddings().weight[:size, :size] = torch.eye(size)
    for token, following in pairwise(chain):
        model.get_output_embeddings().weight[following, token] = scale * math.sqrt(1 / 512 + 1e-6)  # undoes the norm
    return Injection(model)


def test_loss_and_accuracy_of_a_rigged_model_have_known_values() -> None:
    """It answers "yes" whatever is asked."""
    y, e, s = tokenizer().encode("yes", add_special_tokens=False)
    inj = rigged([ROWS[0].prompt[-1], y, e, s, STOP], scale=10.0)
    examples = [Example("a", "yes"), Example("b", "yes"), Example("longer", "u"), Example("d", "yes")]
    found = measure(inj, Plan(), tokenizer(), FORMAT, examples)
    log_z = math.log(math.exp(10) + VOCAB - 1)
    wrong, after_wrong = log_z, math.log(VOCAB)  # the first token of "u", then its stop: nothing follows a "u"
    assert found.loss == pytest.approx((12 * (log_z - 10) + wrong + after_wrong) / 14, rel=1e-5)
    assert (found.items, found.accuracy) == (4, 0.75)
    assert found.wilson[0] < 0.75 < found.wilson[1]
