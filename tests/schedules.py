"""Random schedules of requests, run through the engine and compared with the oracle.

The oracle, `crma.models.reference`, answers one request at a time with transformers' own modules.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import tiny
import tiny_configs
import torch
from hypothesis import strategies as st
from sampling import chooser
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from crma.core.selection import AdapterSelection
from crma.method.backbone import Backbone
from crma.method.injection import Injection, Plan, plan_rows
from crma.method.lora import Lora
from crma.models.reference import Generation, forget_lengths, generate
from server.engine.native.engine import Engine
from server.engine.request import FinishReason, Request, RequestOutput, SamplingParams, TokenLogprob

SELECTIONS = [
    AdapterSelection(None, None),
    AdapterSelection(None, "crma-0"),
    AdapterSelection("task-0", None),
    AdapterSelection("task-0", "crma-0"),
    AdapterSelection("task-1", None),
    AdapterSelection("task-1", "crma-0"),
    AdapterSelection("task-2", None),
    AdapterSelection("task-2", "crma-0"),
    AdapterSelection(None, "crma-1"),
    AdapterSelection("task-1", "crma-1"),
    AdapterSelection("task-3", None),
    AdapterSelection("task-3", "crma-0"),
]


@dataclass(frozen=True)
class Call:
    """One request of a schedule.

    stop_at: its stop token is the one that greedy decoding gives at this position; None: no stop
    token. arrival: the step before which it is added. patience: steps from then until it is
    aborted; None: never.
    """

    selection: AdapterSelection
    prompt: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_at: int | None = None
    arrival: int = 0
    patience: int | None = None
    interactive: bool = True
    owner: str = ""


@dataclass
class Answer:
    """What the engine returned for one sequence."""

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
        if self.reason is not None:
            assert output.completion_tokens == len(self.tokens)


class Loads(Executor):
    """An executor that runs the oldest load of an adapter when `end_one` is called."""

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
    """A model with its adapters, and the answers of the oracle, each computed once."""

    injection: Injection
    adapters: Mapping[str, Lora | Backbone]
    tokenizer: PreTrainedTokenizerBase = field(default_factory=tiny.tokenizer)
    _known: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> tuple[dict[str, Lora], dict[str, Any]]:
        """The LoRAs and the folded backbones by digest, in the model's dtype, on its device."""
        device, dtype = self.injection.model.device, self.injection.model.dtype
        loras: dict[str, Lora] = {}
        backbones: dict[str, Any] = {}
        for digest, adapter in self.adapters.items():
            if isinstance(adapter, Lora):
                loras[digest] = adapter.to(device, dtype)
            else:
                backbones[digest] = adapter.folded(device, dtype)
        return loras, backbones

    def plan(self, selection: AdapterSelection) -> Plan:
        return plan_rows([selection], *self.loaded)

    def alone(self, call: Call, index: int, stop_ids: tuple[int, ...]) -> Generation:
        """The oracle's answer for sequence `index`: one row, transformers' own cache and masks."""
        key = call.selection, call.prompt, call.sampling, index, stop_ids
        if key not in self._known:
            self._known[key] = generate(
                self.injection,
                call.prompt,
                self.plan(call.selection),
                max_tokens=call.sampling.max_tokens,
                stop_ids=stop_ids,
                choose=chooser(call.sampling, call.prompt, index, stop_ids),
            )
        return self._known[key]

    def distribution(self, call: Call, tokens: Sequence[int]) -> Tensor:
        """Log-probabilities [prompt + tokens - 1, vocab] of each next token, from one pass."""
        ids = torch.tensor([[*call.prompt, *tokens]], device=self.injection.model.device)
        forget_lengths(self.injection.model)
        with torch.inference_mode(), self.injection.active(self.plan(call.selection)):
            logits = self.injection.model(input_ids=ids).logits[0, :-1]
            return logits.float().log_softmax(-1).cpu()

    def request(self, name: str, call: Call) -> Request:
        """The call as a request to the engine."""
        stop_ids: tuple[int, ...] = ()
        if call.stop_at is not None:
            unstopped = self.alone(call, 0, ()).token_ids
            stop_ids = unstopped[call.stop_at : call.stop_at + 1]
        return Request(
            id=name,
            prompt_ids=call.prompt,
            stop_token_ids=stop_ids,
            sampling=call.sampling,
            selection=call.selection,
            interactive=call.interactive,
            owner=call.owner,
        )


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """A random prompt of `length` tokens. Prompts of one seed share their first tokens."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, tiny_configs.VOCAB, (length,), generator=generator).tolist())


def samplings(most_tokens: int) -> st.SearchStrategy[SamplingParams]:
    """Mostly greedy sampling; one in three draws every sampling option at random."""
    greedy = st.builds(
        SamplingParams,
        max_tokens=st.integers(0, most_tokens),
        n=st.sampled_from([1, 1, 1, 2]),
        logprobs=st.just(2),
        prompt_logprobs=st.sampled_from([None, None, None, 1]),
        prompt_logprobs_from=st.sampled_from([1, 1, 9]),
    )
    options = {
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 0, 5]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.5]),
        "logit_bias": st.sampled_from([(), ((7, 3.0), (40, -100.0))]),
        "min_tokens": st.sampled_from([0, 5]),
        "seed": st.integers(0, 3),
    }
    sampled = st.builds(
        lambda params, drawn: replace(params, **drawn), greedy, st.fixed_dictionaries(options)
    )
    return st.one_of(greedy, greedy, sampled)


def calls(prompts: st.SearchStrategy[tuple[int, ...]], most_tokens: int) -> st.SearchStrategy[Call]:
    """Calls with any selection, sampling, arrival, patience and owner."""
    return st.builds(
        Call,
        selection=st.sampled_from(SELECTIONS),
        prompt=prompts,
        sampling=samplings(most_tokens),
        stop_at=st.sampled_from([None, None, None, 1, 3]),
        arrival=st.integers(0, 12),
        patience=st.sampled_from([None] * 5 + [0, 1, 4]),
        interactive=st.booleans(),
        owner=st.sampled_from(["", "", "a", "b"]),
    )


def run(
    world: World, schedule: Sequence[Call], *, room: int = 160, block_size: int = 8, **limits: int
) -> tuple[list[tuple[Call, int, Answer]], Engine]:
    """Run a schedule until every sequence has ended; check the engine's integrity at every step.

    After each step one load of an adapter ends.

    Args:
        room: tokens that the KV cache holds.
        limits: further arguments of `tiny.make_engine`.

    Returns:
        (call, index, answer) of every sequence, and the engine.
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
    requests = [world.request(str(number), call) for number, call in enumerate(schedule)]
    answers: dict[tuple[str, int], Answer] = {}
    for request in requests:
        for index in range(request.sampling.n):
            answers[request.id, index] = Answer()
    for step in range(2000):
        outputs = _come_and_go(engine, requests, schedule, step)
        outputs += engine.step()
        for output in outputs:
            answers[output.request_id, output.index].take(output)
        engine.check_integrity()
        loads.end_one()
        if all(answer.reason for answer in answers.values()):
            break
    else:
        raise AssertionError("a request starves")
    assert not engine.scheduler.unfinished()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.capacity
    assert engine.pool.num_users() == 0
    ended = [(schedule[int(name)], index, answer) for (name, index), answer in answers.items()]
    return ended, engine


def _come_and_go(
    engine: Engine, requests: Sequence[Request], schedule: Sequence[Call], step: int
) -> list[RequestOutput]:
    """Add the requests that arrive before a step, and abort those whose patience ends there."""
    outputs: list[RequestOutput] = []
    for request, call in zip(requests, schedule, strict=True):
        if call.arrival == step:
            engine.add(request)
        if call.patience is not None and call.arrival + call.patience == step:
            outputs += engine.abort(request.id)
    return outputs


def mismatches(world: World, answer: Answer, call: Call, index: int, tolerance: float) -> list[str]:
    """What differs from the oracle's answer, by name; empty if nothing does.

    An aborted sequence must equal the beginning of the oracle's.
    """
    oracle = world.alone(call, index, world.request("", call).stop_token_ids)
    cancelled = answer.reason is FinishReason.ABORT and call.patience is not None
    wanted = oracle.token_ids[: len(answer.tokens)] if cancelled else oracle.token_ids
    errors = [
        abs(ours.logprob - theirs)
        for ours, theirs in zip(answer.logprobs, oracle.logprobs, strict=False)
    ]
    complete = len(answer.logprobs) == len(wanted)
    text = world.tokenizer.decode(answer.tokens, skip_special_tokens=True)
    checks = {
        "tokens": tuple(answer.tokens) == wanted,
        "log-probabilities": complete and max(errors, default=0.0) <= tolerance,
        "top": all(_top_is_in_order(token) for token in answer.logprobs),
        "text": answer.text == text,
        "reason": cancelled or answer.reason == oracle.finish_reason,
        "prompt": _prompt_logprobs_are_right(world, answer, call, tolerance),
        "prompt asked for": cancelled or len(answer.prompt_logprobs) == _num_asked(call, index),
    }
    return [name for name, right in checks.items() if not right]


def is_at_border(world: World, answer: Answer, call: Call, index: int, tolerance: float) -> bool:
    """Whether the oracle gives a sampled answer at a minimally other temperature.

    A draw can fall on the border between two tokens, within the rounding of fp32. That is no rare
    case where thousands of tokens are about equally probable.
    """
    for shift in (1e-6, -1e-6, 1e-5, -1e-5, 1e-4, -1e-4):
        temperature = call.sampling.temperature * (1 + shift)
        nudged = replace(call, sampling=replace(call.sampling, temperature=temperature))
        if not mismatches(world, answer, nudged, index, tolerance):
            return True
    return False


def _top_is_in_order(token: TokenLogprob) -> bool:
    """The most probable token comes first, and the chosen one is no more probable."""
    best, second = token.top[0][1], token.top[1][1]
    return best >= second and best >= token.logprob


def _num_asked(call: Call, index: int) -> int:
    """How many tokens of the prompt must come with a log-probability."""
    if call.sampling.prompt_logprobs is None or index > 0:
        return 0
    return max(0, len(call.prompt) - call.sampling.prompt_logprobs_from)


def _prompt_logprobs_are_right(world: World, answer: Answer, call: Call, tolerance: float) -> bool:
    """The prompt's log-probabilities, and the best at each place, are those of one pass.

    A sequence that was aborted during its prompt may have only some of them, or none.
    """
    num = len(answer.prompt_logprobs)
    if num == 0:
        return True
    first = call.sampling.prompt_logprobs_from
    rows = world.distribution(call, [])[first - 1 :][:num]
    tokens = torch.tensor(call.prompt[first : first + len(rows)])
    own = rows.gather(-1, tokens[:, None])[:, 0]
    found_own = torch.tensor([token.logprob for token in answer.prompt_logprobs])
    found_best = torch.tensor([token.top[0][1] for token in answer.prompt_logprobs])
    found = torch.stack([found_own, found_best])
    expected = torch.stack([own, rows.amax(-1)])
    return torch.allclose(found, expected, rtol=0, atol=tolerance)
