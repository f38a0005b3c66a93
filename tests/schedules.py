"""Any mix of requests through the engine, and what each gets alone: shared by the numerics, e2e
and GPU tests.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import tiny
import torch
from hypothesis import strategies as st
from sampling import chooser
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crma.core.selection import AdapterSelection
from crma.method.backbone import Backbone
from crma.method.injection import Injection, Plan, plan_rows
from crma.method.lora import Lora
from crma.models.reference import Generation, generate
from server.engine.native.engine import Engine
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprob

SELECTIONS = [
    AdapterSelection(task, crma)
    for task in (None, "task-0", "task-1", "task-2")
    for crma in (None, "crma-0")
]
SELECTIONS += [AdapterSelection(None, "crma-1"), AdapterSelection("task-1", "crma-1")]


@dataclass(frozen=True)
class Call:
    """One request of a schedule: when it comes and goes, and what it asks.

    `stop_at`: its token of that number ends.
    """

    selection: AdapterSelection
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_at: int | None = None
    arrival: int = 0
    patience: int | None = None
    interactive: bool = True


@dataclass
class Answer:
    """What came back of one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None

    def take(self, output: RequestOutput) -> None:
        assert self.reason is None, "an output after the last one"
        self.tokens += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.text += output.text
        self.reason = output.finish_reason
        assert self.reason is None or output.completion_tokens == len(self.tokens)


class Loads(Executor):
    """Loads that end when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future, Any]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        self.waiting.append((future, lambda: function(*args, **kwargs)))
        return future

    def end_one(self) -> None:
        if self.waiting:
            future, load = self.waiting.pop(0)
            future.set_result(load())


@dataclass(eq=False)
class World:
    """A model and its adapters; what the oracle says is kept."""

    injection: Injection
    adapters: Mapping[str, Lora | Backbone]
    tokenizer: PreTrainedTokenizerBase = field(default_factory=tiny.tokenizer)
    _known: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> tuple[dict[str, Lora], dict[str, Any]]:
        where = self.injection.model.device, self.injection.model.dtype
        loras = {d: a.to(*where) for d, a in self.adapters.items() if isinstance(a, Lora)}
        return loras, {
            d: a.folded(*where) for d, a in self.adapters.items() if isinstance(a, Backbone)
        }

    def plan(self, selection: AdapterSelection) -> Plan:
        return plan_rows([selection], *self.loaded)

    def alone(self, call: Call, index: int, stop_ids: tuple[int, ...]) -> Generation:
        """The model by itself, transformers' own cache and masks, one row."""
        key = call.selection, call.prompt, call.sampling, index, stop_ids
        if key not in self._known:
            options: Any = {"max_tokens": call.sampling.max_tokens, "stop_ids": stop_ids}
            options["choose"] = chooser(call.sampling, call.prompt, index)
            self._known[key] = generate(
                self.injection, call.prompt, self.plan(call.selection), **options
            )
        return self._known[key]

    def distribution(self, call: Call, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities [prompt + tokens - 1, vocab] of each next token, in one pass over all
        of it.
        """
        ids = torch.tensor([[*call.prompt, *tokens]], device=self.injection.model.device)
        with torch.inference_mode(), self.injection.active(self.plan(call.selection)):
            return self.injection.model(input_ids=ids).logits[0, :-1].float().log_softmax(-1).cpu()

    def request(self, name: str, call: Call) -> Request:
        stop = () if call.stop_at is None else self.alone(call, 0, ()).token_ids[call.stop_at :][:1]
        return Request(
            name, call.prompt, stop, call.sampling, call.selection, interactive=call.interactive
        )


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Prompts of one seed begin alike."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, tiny.VOCAB, (length,), generator=generator).tolist())


def samplings(most_tokens: int) -> st.SearchStrategy[SamplingParams]:
    """Mostly greedy; sampled ones with every option of their own."""
    greedy = st.builds(
        SamplingParams,
        max_tokens=st.integers(1, most_tokens),
        n=st.sampled_from([1, 1, 1, 2]),
        logprobs=st.just(2),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        prompt_logprobs_from=st.sampled_from([1, 1, 9]),
    )
    other = {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.5]),
        "seed": st.integers(0, 3),
    }
    sampled = st.builds(
        lambda params, options: replace(params, **options), greedy, st.fixed_dictionaries(other)
    )
    return st.one_of(greedy, greedy, sampled)


def calls(prompts: st.SearchStrategy[tuple[int, ...]], most_tokens: int) -> st.SearchStrategy[Call]:
    """Any selection, sampling, arrival and patience."""
    return st.builds(
        Call,
        selection=st.sampled_from(SELECTIONS),
        prompt=prompts,
        sampling=samplings(most_tokens),
        stop_at=st.sampled_from([None, None, None, 1, 3]),
        arrival=st.integers(0, 12),
        patience=st.sampled_from([None] * 5 + [0, 1, 4]),
        interactive=st.booleans(),
    )


def run(
    world: World, schedule: Sequence[Call], *, room: int = 160, block_size: int = 8, **limits: int
) -> tuple[list[tuple[Call, int, Answer]], Engine]:
    """(call, index, answer) of every sequence, and the engine, whose KV cache holds `room` tokens.

    Steps until nothing is left; loads of adapters end between steps, one a step.
    """
    options = {
        "num_blocks": room // block_size,
        "block_size": block_size,
        "max_model_len": min(room, 400),
        **limits,
    }
    loads = Loads()
    engine, _ = tiny.make_engine(world.injection, world.adapters, executor=loads, **options)
    engine.tokenizer = world.tokenizer
    requests = [world.request(str(i), call) for i, call in enumerate(schedule)]
    answers = {(r.id, i): Answer() for r in requests for i in range(r.sampling.n)}
    for step in range(2000):
        outputs: list[RequestOutput] = []
        for request, call in zip(requests, schedule, strict=True):
            if call.arrival == step:
                engine.add(request)
            if call.patience is not None and call.arrival + call.patience == step:
                outputs += engine.abort(request.id)
        outputs += engine.step()
        for output in outputs:
            answers[output.request_id, output.index].take(output)
        engine.check_integrity()
        loads.end_one()
        if all(answer.reason for answer in answers.values()):
            assert not engine.scheduler.unfinished()
            assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.capacity
            assert engine.pool.num_users() == 0
            return [
                (schedule[int(name)], index, answer) for (name, index), answer in answers.items()
            ], engine
    raise AssertionError("a request starves")


def mismatches(world: World, answer: Answer, call: Call, index: int, tolerance: float) -> list[str]:
    """What is not as the oracle has it; a cancelled sequence has as much of it as it had time for."""
    oracle = world.alone(call, index, world.request("", call).stop_token_ids)
    cancelled = answer.reason is FinishReason.ABORT and call.patience is not None
    wanted = oracle.token_ids[: len(answer.tokens)] if cancelled else oracle.token_ids
    errors = [abs(a.logprob - b) for a, b in zip(answer.logprobs, oracle.logprobs, strict=False)]
    checks = {
        "tokens": tuple(answer.tokens) == wanted,
        "log-probabilities": len(answer.logprobs) == len(wanted)
        and max(errors, default=0.0) <= tolerance,
        "top": all(
            one.top[0][1] >= one.top[1][1] and one.top[0][1] >= one.logprob
            for one in answer.logprobs
        ),
        "text": answer.text == world.tokenizer.decode(answer.tokens, skip_special_tokens=True),
        "reason": cancelled or answer.reason == oracle.finish_reason,
    }
    first = call.sampling.prompt_logprobs_from
    if answer.prompt_logprobs:  # it may have been cancelled in the prompt
        rows = world.distribution(call, [])[first - 1 :][: len(answer.prompt_logprobs)]
        asked = torch.tensor([one.logprob for one in answer.prompt_logprobs])
        best = torch.tensor([one.top[0][1] for one in answer.prompt_logprobs])
        own = rows.gather(-1, torch.tensor(call.prompt[first : first + len(rows)])[:, None])[:, 0]
        found, expected = torch.stack([asked, best]), torch.stack([own, rows.amax(-1)])
        checks["prompt"] = torch.allclose(found, expected, rtol=0, atol=tolerance)
    asks = call.sampling.prompt_logprobs is not None and index == 0
    num_asked = max(0, len(call.prompt) - first) if asks else 0
    checks["prompt asked for"] = cancelled or len(answer.prompt_logprobs) == num_asked
    return [name for name, right in checks.items() if not right]
