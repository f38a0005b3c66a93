"""Loss and greedy answers of one selection on a list of examples. Dropout off, fixed batches, fp32 log-softmax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from crma.data import Example
from crma.injection import Injection, Plan
from crma.prompts import PromptFormat
from crma.scorers import exact
from crma.statistics import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100


class Encoded(NamedTuple):
    """Token ids of one example: the user turn, and the answer with its stop token."""

    prompt: list[int]
    answer: list[int]


class Batch(NamedTuple):
    """Left-padded rows, so that every answer ends at the last column and logits are needed for `keep` columns only.

    Shapes: b rows, s positions, keep = the longest answer. input_ids, attention_mask [b, s]; targets [b, keep]
    (IGNORED left of an answer).
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        """Real (not padding) tokens."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Measure:
    """Loss in nats per answer token; exact-match accuracy with its Wilson interval; how much was measured."""

    loss: float
    accuracy: float
    items: int
    wilson: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"loss": self.loss, "accuracy": self.accuracy, "items": self.items, "wilson": list(self.wilson)}


def encode_examples(
    tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, examples: Iterable[Example]
) -> list[Encoded]:
    """The same tokens in training, evaluation and serving."""
    return [Encoded(fmt.encode(tokenizer, e.prompt), fmt.encode_answer(tokenizer, e.completion)) for e in examples]


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """One left-padded batch. The last answer token is only a target."""
    sequences = [row.prompt + row.answer[:-1] for row in rows]
    width, keep = max(map(len, sequences)), max(len(row.answer) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    targets = torch.full((len(rows), keep), IGNORED)
    for i, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        input_ids[i, width - len(sequence) :] = torch.tensor(sequence)
        attention_mask[i, width - len(sequence) :] = 1
        targets[i, keep - len(row.answer) :] = torch.tensor(row.answer)
    return Batch(input_ids.to(device), attention_mask.to(device), targets.to(device))


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids of left-padded rows: 0 at each row's first real token."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def answer_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Summed negative log-likelihood of the answer tokens, in nats; logits only where an answer is."""
    wanted = batch.targets != IGNORED

    def answers_only(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][wanted]  # [b, keep, d] -> [answer tokens, d]

    hook = model.get_output_embeddings().register_forward_pre_hook(answers_only)
    try:
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=positions(batch.attention_mask),
            use_cache=False,
            logits_to_keep=batch.targets.shape[1],
        )
    finally:
        hook.remove()
    return nn.functional.cross_entropy(output.logits.float(), batch.targets[wanted], reduction="sum")


def by_length(rows: Sequence[Encoded], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length: fixed, whatever else changes."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt) + len(rows[i].answer), i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


@torch.inference_mode()
def mean_loss(injection: Injection, plan: Plan, rows: Sequence[Encoded], pad_id: int, batch_size: int = 50) -> float:
    """Nats per answer token over all rows, every row under the same plan."""
    device = next(injection.model.parameters()).device
    total, count = 0.0, 0
    with injection.active(plan):
        for indices in by_length(rows, batch_size):
            batch = collate([rows[i] for i in indices], pad_id, device)
            total += answer_loss(injection.model, batch).item()
            count += int((batch.targets != IGNORED).sum())
    return total / count


@torch.inference_mode()
def greedy_answers(
    injection: Injection,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Encoded],
    stop_id: int,
    *,
    max_tokens: int = 16,
    batch_size: int = 50,
) -> list[str]:
    """The greedy answer of every row, by transformers' own generate."""
    device = next(injection.model.parameters()).device
    answers = [""] * len(rows)
    with injection.active(plan):
        for indices in by_length(rows, batch_size):
            batch = collate([Encoded(rows[i].prompt, [stop_id]) for i in indices], stop_id, device)
            ids = injection.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                do_sample=False,
                max_new_tokens=max_tokens,
                eos_token_id=stop_id,
                pad_token_id=stop_id,
            )
            texts = tokenizer.batch_decode(ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
            for i, text in zip(indices, texts, strict=True):
                answers[i] = text
    return answers


def measure(
    injection: Injection,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    examples: Sequence[Example],
) -> Measure:
    """Loss and exact-match accuracy of one plan on `examples`."""
    rows = encode_examples(tokenizer, fmt, examples)
    stop_id = fmt.stop_id(tokenizer)
    answers = greedy_answers(injection, plan, tokenizer, rows, stop_id)
    correct = sum(exact(answer, [e.completion]) for answer, e in zip(answers, examples, strict=True))
    return Measure(
        loss=mean_loss(injection, plan, rows, stop_id),
        accuracy=correct / len(examples),
        items=len(examples),
        wilson=wilson(correct, len(examples)),
    )
