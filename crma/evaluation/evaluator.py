"""Loss, greedy answers and likelihoods of one selection: fixed batches, log-softmax in fp32."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import fsum
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from crma.data.examples import Example
from crma.evaluation.scorers import Likelihood
from crma.evaluation.statistics import wilson
from crma.method.injection import Injection, Plan
from crma.models.prompts import Format

IGNORED = -100


class Encoded(NamedTuple):
    """Token ids of one example: the formatted user turn, and the answer with its stop token."""

    prompt: list[int]
    answer: list[int]


class Batch(NamedTuple):
    """Left-padded rows.

    Every answer ends at the last column, so logits are needed for the last `keep` columns only.

    Shapes, for b rows, s positions and a longest answer of `keep` tokens: input_ids and
    attention_mask [b, s]; targets [b, keep], IGNORED to the left of an answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor

    @property
    def num_tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.attention_mask.sum())


class ItemMeasure(NamedTuple):
    """What `Evaluator.measure_items` found of one row."""

    nats: float  # negative log-likelihood of its answer, summed over the answer's tokens
    num_tokens: int  # of its answer
    is_right: bool  # greedy decoding gives exactly this answer, and stops


@dataclass(frozen=True)
class Measure:
    """What `Evaluator.measure` found.

    Args:
        loss: nats per answer token.
        accuracy: share of exact matches.
        items: number of rows measured.
        wilson: 95 % interval of the accuracy.
    """

    loss: float
    accuracy: float
    items: int
    wilson: tuple[float, float]

    @classmethod
    def of(cls, items: Sequence[ItemMeasure]) -> Self:
        """The measure of rows that were measured one by one."""
        correct = sum(item.is_right for item in items)
        nats = fsum(item.nats for item in items)
        num_tokens = sum(item.num_tokens for item in items)
        n = len(items)
        return cls(nats / num_tokens, correct / n, n, wilson(correct, n))


def collate(rows: Sequence[Encoded], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Make one left-padded batch. The last token of an answer is a target and never an input.

    Args:
        rows: the examples.
        pad_id: token id of the padding.
        device: where the batch goes.
    """
    read = [torch.tensor(row.prompt + row.answer[:-1]) for row in rows]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    input_ids = pad(read, padding_value=pad_id)
    attention_mask = pad([torch.ones_like(ids) for ids in read])
    targets = pad([torch.tensor(row.answer) for row in rows], padding_value=IGNORED)
    return Batch(input_ids.to(device), attention_mask.to(device), targets.to(device))


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return logits [answer tokens of all rows, vocabulary] in the model's dtype.

    The output layer runs on the answers' positions only.
    """
    wanted = batch.targets != IGNORED

    def answers_only(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][wanted]  # [b, keep, d] -> [answer tokens, d]

    hook = model.get_output_embeddings().register_forward_pre_hook(answers_only)
    try:
        return last_logits(model, batch)
    finally:
        hook.remove()


def last_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Return logits [b, keep, vocabulary] in the model's dtype, of the last `keep` columns."""
    positions = batch.attention_mask.cumsum(-1) - 1  # 0 at the first real token of each row
    output = model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=positions.clamp(min=0),
        use_cache=False,
        logits_to_keep=batch.targets.shape[1],
    )
    return output.logits


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Return the summed negative log-likelihood, in nats, of the answer tokens of a batch.

    Args:
        logits: the batch's `answer_logits`.
        batch: holds the targets.
    """
    targets = batch.targets[batch.targets != IGNORED]
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


@dataclass(frozen=True)
class Evaluator:
    """Asks a model under any plan, in one prompt format.

    Batches hold rows of similar length, and the same rows always make the same batches.

    Args:
        injection: the model.
        tokenizer: its tokenizer.
        fmt: the prompt format.
        batch_size: the most rows in a batch.
    """

    injection: Injection
    tokenizer: PreTrainedTokenizerBase
    fmt: Format
    batch_size: int = 50

    @property
    def stop_id(self) -> int:
        """The token that ends an answer; it is also the padding."""
        return self.fmt.stop_id(self.tokenizer)

    def encode(self, examples: Iterable[Example]) -> list[Encoded]:
        """Tokenise examples, the same in training, evaluation and serving."""
        rows = []
        for example in examples:
            prompt = self.fmt.encode(self.tokenizer, example.prompt)
            answer = self.fmt.encode_answer(self.tokenizer, example.completion)
            rows.append(Encoded(prompt, answer))
        return rows

    def measure(self, plan: Plan, rows: Sequence[Encoded]) -> Measure:
        """Measure loss and exact-match accuracy on rows, in one forward pass per batch."""
        return Measure.of(self.measure_items(plan, rows))

    @torch.inference_mode()
    def measure_items(self, plan: Plan, rows: Sequence[Encoded]) -> list[ItemMeasure]:
        """Measure every row [n], in one forward pass per batch.

        A row is right if each of its answer tokens is the likeliest after the tokens before it:
        then, and only then, greedy decoding gives exactly this answer and stops.
        """
        model = self.injection.model
        measured = [ItemMeasure(0.0, 0, False)] * len(rows)
        with self.injection.active(plan):
            for indices in self._by_length(rows):
                batch = collate([rows[i] for i in indices], self.stop_id, model.device)
                logits = answer_logits(model, batch)
                targets = batch.targets[batch.targets != IGNORED]  # [answer tokens]
                nats = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
                is_likeliest = logits.argmax(-1) == targets
                lengths = [len(rows[i].answer) for i in indices]
                parts = zip(
                    torch.split(nats, lengths), torch.split(is_likeliest, lengths), strict=True
                )
                for i, (row_nats, row_likeliest) in zip(indices, parts, strict=True):
                    is_right = bool(row_likeliest.all())
                    measured[i] = ItemMeasure(row_nats.sum().item(), len(row_nats), is_right)
        return measured

    @torch.inference_mode()
    def answers(self, plan: Plan, prompts: Sequence[str], *, max_tokens: int = 16) -> list[str]:
        """Return the greedy answers [n] to prompts [n], by transformers' own generate."""
        model = self.injection.model
        stop_id = self.stop_id
        answers = [""] * len(prompts)
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
                new_ids = ids[:, batch.input_ids.shape[1] :]
                texts = self.tokenizer.batch_decode(new_ids, skip_special_tokens=True)
                for i, text in zip(indices, texts, strict=True):
                    answers[i] = text
        return answers

    @torch.inference_mode()
    def likelihoods(self, plan: Plan, rows: Sequence[Encoded]) -> list[Likelihood]:
        """Return the likelihood of every row's answer, which need not end with the stop token."""
        model = self.injection.model
        likelihoods = [Likelihood(0.0, 0)] * len(rows)
        with self.injection.active(plan):
            for indices in self._by_length(rows):
                batch = collate([rows[i] for i in indices], self.stop_id, model.device)
                targets = batch.targets[batch.targets != IGNORED]
                logprobs = answer_logits(model, batch).float().log_softmax(-1)
                of_targets = logprobs.gather(-1, targets[:, None])[:, 0]  # [answer tokens]
                lengths = [len(rows[i].answer) for i in indices]
                for i, part in zip(indices, torch.split(of_targets, lengths), strict=True):
                    likelihoods[i] = Likelihood(part.sum().item(), len(part))
        return likelihoods

    def _by_length(self, rows: Sequence[Encoded]) -> Iterator[list[int]]:
        """Yield the indices of one batch after the other, the shortest rows first."""
        lengths = [len(row.prompt) + len(row.answer) for row in rows]
        order = sorted(range(len(rows)), key=lengths.__getitem__)  # stable: equal lengths in order
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]
