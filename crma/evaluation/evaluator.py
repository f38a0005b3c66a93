"""Loss and greedy answers of one selection on a list of examples. Dropout off, fixed batches, fp32 log-softmax."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from crma.data.examples import Example
from crma.evaluation.scorers import Likelihood
from crma.evaluation.statistics import wilson
from crma.method.injection import Injection, Plan
from crma.models.prompts import PromptFormat

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


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """One left-padded batch. The last answer token is only a target."""
    read = [torch.tensor(row.prompt + row.answer[:-1]) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    input_ids = pad(read, padding_value=pad_id)
    attention_mask = pad([torch.ones_like(ids) for ids in read])
    targets = pad([torch.tensor(row.answer) for row in rows], padding_value=IGNORED)
    return Batch(input_ids.to(device), attention_mask.to(device), targets.to(device))


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[answer tokens of all rows, vocabulary], in the model's dtype: logits only where an answer is."""
    wanted = batch.targets != IGNORED

    def answers_only(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][wanted]  # [b, keep, d] -> [answer tokens, d]

    hook = model.get_output_embeddings().register_forward_pre_hook(answers_only)
    try:
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=(batch.attention_mask.cumsum(-1) - 1).clamp(
                min=0
            ),  # 0 at each first real token
            use_cache=False,
            logits_to_keep=batch.targets.shape[1],
        )
    finally:
        hook.remove()
    return output.logits


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Summed negative log-likelihood of the answer tokens, in nats, from their `answer_logits`."""
    return nn.functional.cross_entropy(
        logits.float(), batch.targets[batch.targets != IGNORED], reduction="sum"
    )


@dataclass(frozen=True)
class Evaluator:
    """A model under any plan, asked in one prompt format. Batches hold rows of similar length, and always the same."""

    injection: Injection
    tokenizer: PreTrainedTokenizerBase
    fmt: PromptFormat
    batch_size: int = 50

    @property
    def stop_id(self) -> int:
        """The token that ends an answer; it pads as well."""
        return self.fmt.stop_id(self.tokenizer)

    def encode(self, examples: Iterable[Example]) -> list[Encoded]:
        """The same tokens in training, evaluation and serving."""
        fmt, tokenizer = self.fmt, self.tokenizer
        return [
            Encoded(fmt.encode(tokenizer, e.prompt), fmt.encode_answer(tokenizer, e.completion))
            for e in examples
        ]

    @torch.inference_mode()
    def measure(self, plan: Plan, rows: Sequence[Encoded]) -> Measure:
        """Loss, and accuracy by token: a row is right if each of its answer tokens is the likeliest after those before.

        That is when greedy decoding gives exactly this answer and stops, so one forward pass measures both.
        """
        total, count, correct = 0.0, 0, 0
        with self.injection.active(plan):
            for indices in self._by_length(rows):
                batch = collate(
                    [rows[i] for i in indices], self.stop_id, self.injection.model.device
                )
                logits, wrong = answer_logits(self.injection.model, batch), batch.targets != IGNORED
                total += answer_loss(logits, batch).item()
                count += len(logits)
                wrong[wrong.clone()] = logits.argmax(-1) != batch.targets[wrong]
                correct += int((~wrong.any(dim=1)).sum())
        return Measure(total / count, correct / len(rows), len(rows), wilson(correct, len(rows)))

    @torch.inference_mode()
    def answers(self, plan: Plan, prompts: Sequence[str], *, max_tokens: int = 16) -> list[str]:
        """The greedy answer to every prompt, by transformers' own generate."""
        model, stop_id, answers = self.injection.model, self.stop_id, [""] * len(prompts)
        rows = [Encoded(self.fmt.encode(self.tokenizer, prompt), [stop_id]) for prompt in prompts]
        greedy = {
            "do_sample": False,
            "max_new_tokens": max_tokens,
            "eos_token_id": stop_id,
            "pad_token_id": stop_id,
        }
        with self.injection.active(plan):
            for indices in self._by_length(rows):
                batch = collate([rows[i] for i in indices], stop_id, model.device)
                ids = model.generate(batch.input_ids, attention_mask=batch.attention_mask, **greedy)
                texts = self.tokenizer.batch_decode(
                    ids[:, batch.input_ids.shape[1] :], skip_special_tokens=True
                )
                for i, text in zip(indices, texts, strict=True):
                    answers[i] = text
        return answers

    @torch.inference_mode()
    def likelihoods(self, plan: Plan, rows: Sequence[Encoded]) -> list[Likelihood]:
        """Of the answer of every row, which need not end with the stop token."""
        found = [Likelihood(0.0, 0)] * len(rows)
        with self.injection.active(plan):
            for indices in self._by_length(rows):
                batch = collate(
                    [rows[i] for i in indices], self.stop_id, self.injection.model.device
                )
                targets = batch.targets[batch.targets != IGNORED]
                logprobs = answer_logits(self.injection.model, batch).float().log_softmax(-1)
                parts = torch.split(
                    logprobs.gather(-1, targets[:, None])[:, 0],
                    [len(rows[i].answer) for i in indices],
                )
                for i, part in zip(indices, parts, strict=True):
                    found[i] = Likelihood(part.sum().item(), len(part))
        return found

    def _by_length(self, rows: Sequence[Encoded]) -> Iterator[list[int]]:
        order = sorted(
            range(len(rows)), key=lambda i: (len(rows[i].prompt) + len(rows[i].answer), i)
        )
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]
