"""Solo = batched on the real base model and the shipped adapters.

fp32 agrees to the token, except where a draw falls on the border between two. In bf16, our errors
against fp32 are as large as those of transformers' modules.
"""

import operator
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import paths
import pytest
import tiny
import torch
from dora import dora
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rounding import MAX_RATIO, Rounding
from schedules import Answer, Call, World, calls, is_at_border, mismatches, run
from torch import Tensor

from crma.evaluation.question_set import read_question_set
from crma.method.injection import Injection
from crma.models.base_model import find_base
from crma.models.loading import load_model, load_tokenizer
from crma.store.adapter_store import AdapterStore
from server.engine.native.engine import Engine
from server.engine.request import FinishReason, SamplingParams

pytestmark = pytest.mark.e2e

STORE = AdapterStore(paths.STORE)
QUESTIONS = read_question_set(STORE.root / "question_sets" / "public.jsonl").questions
TOLERANCE = 1e-4  # of a log-probability, in fp32
# Schedules. Many CPUs have no arithmetic for bf16, and take some thirty times as long for it.
NUM_SCHEDULES = {torch.float32: 20, torch.bfloat16: 8}
LIMITS = {
    "max_num_seqs": st.integers(2, 8),
    "max_num_batched_tokens": st.sampled_from([16, 48, 256]),
    "block_size": st.sampled_from([2, 16]),
    "room": st.sampled_from([128, 144, 1024]),  # tokens in the KV cache
    "prefix_caching": st.booleans(),
    "max_resident": st.integers(2, 5),
}


def real_world(dtype: torch.dtype, device: torch.device) -> World:
    """The real base model, shipped adapters, and a random DoRA and backbone."""
    base = find_base()
    injection = Injection(load_model(base, device, dtype))
    adapters = {
        "task-0": STORE.task("medical").load(),
        "task-1": STORE.task("legal").load(),
        "task-2": STORE.task("code").load(),
        # A stronger one amplifies rounding beyond TOLERANCE: in fp32, its own error is over 1e-3.
        "task-3": dora(injection, 3, seed=3, strength=0.1),
        "crma-0": STORE.backbone().load(),
        "crma-1": tiny.backbone(injection, seed=1),
    }
    return World(injection, adapters, load_tokenizer(base))


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, unless `--device cuda` says otherwise."""
    return torch.device(request.config.getoption("--device") or "cpu")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def world(request: pytest.FixtureRequest, device: torch.device) -> World:
    return real_world(request.param, device)


@pytest.fixture(scope="module")
def exact(world: World, device: torch.device) -> World:
    """The same weights in fp32; the base model's are recorded in bf16."""
    if world.injection.model.dtype == torch.float32:
        return world
    return real_world(torch.float32, device)


def prompts(world: World) -> st.SearchStrategy[tuple[int, ...]]:
    """Questions in the adapters' prompt format, some after a shared beginning of one or two."""
    prompt_format = STORE.task("medical").prompt_format
    encoded = [
        tuple(prompt_format.encode(world.tokenizer, question.question)) for question in QUESTIONS
    ]
    one = encoded[0]
    two = encoded[1] + encoded[2]
    beginnings = st.sampled_from([(), one, two])
    return st.builds(operator.add, beginnings, st.sampled_from(encoded))


def is_greedy(call: Call) -> bool:
    """Whether the oracle's distribution alone decides each token: temperature 0, no penalties."""
    neutral = replace(
        call.sampling, max_tokens=1, n=1, seed=None, prompt_logprobs=None, logprobs=None
    )
    return neutral == SamplingParams(max_tokens=1)


def of_answer(world: World, call: Call, answer: Answer) -> Tensor:
    """The oracle's distribution [n, vocab] of each token of an answer, from one pass."""
    return world.distribution(call, answer.tokens)[len(call.prompt) - 1 :]


def gap_at_divergence(rows: Tensor, answer: Answer, alone: Sequence[int]) -> float:
    """How far apart the first token that differs from the oracle's and the oracle's own are.

    Args:
        rows: [n, vocab] log-probabilities of each token of the answer.
        alone: the oracle's answer.

    Returns:
        0 if none differs.
    """
    for row, token, oracle_token in zip(rows, answer.tokens, alone, strict=False):
        if token != oracle_token:
            return abs(row[token] - row[oracle_token]).item()
    return 0.0


@dataclass
class Comparison:
    """Compares schedules with the oracle and counts what they covered."""

    world: World
    exact: World  # in fp32
    counts: Counter[str] = field(default_factory=Counter)
    rounding: Rounding = field(default_factory=Rounding)
    max_gap: float = 0.0  # in fp32, where a greedy token is not the oracle's

    @property
    def dtype(self) -> torch.dtype:
        return self.world.injection.model.dtype

    def check(self, answered: list[tuple[Call, int, Answer]], engine: Engine) -> None:
        """Check every answer of one schedule.

        In fp32 only a draw at the border of two tokens may differ. In bf16, differences are
        counted.
        """
        for call, index, answer in answered:
            assert answer.reason is not FinishReason.ERROR
            if self.dtype == torch.float32:
                self._check_equal(call, index, answer)
            elif is_greedy(call) and answer.tokens:
                self._compare_rounding(call, answer)
            self.counts["tokens"] += len(answer.tokens)
        self.counts["schedules"] += 1
        self.counts["sequences"] += len(answered)
        self.counts["preemptions"] += engine.counters.num_preemptions
        self.counts["cached tokens"] += engine.counters.prefix_cache_hits

    def _check_equal(self, call: Call, index: int, answer: Answer) -> None:
        wrong = mismatches(self.world, answer, call, index, TOLERANCE)
        if wrong:
            at_border = is_at_border(self.world, answer, call, index, TOLERANCE)
            assert at_border, (wrong, call, index, answer)
            self.counts["at a border"] += 1

    def _compare_rounding(self, call: Call, answer: Answer) -> None:
        """Compare a greedy answer's error with that of the modules in bf16, both against fp32."""
        rows = of_answer(self.exact, call, answer)
        tokens = torch.tensor(answer.tokens)[:, None]
        theirs = of_answer(self.world, call, answer).gather(-1, tokens)[:, 0]
        ours = torch.tensor([one.logprob for one in answer.logprobs])
        self.rounding.add(ours, theirs, rows.gather(-1, tokens)[:, 0])
        alone = self.world.alone(call, 0, self.world.request("", call).stop_token_ids).token_ids
        gap = gap_at_divergence(rows, answer, alone)
        self.max_gap = max(self.max_gap, gap)
        self.counts["greedy"] += 1
        self.counts["divergences"] += gap > 0


def test_random_schedules_give_the_oracles_answers(
    world: World,
    exact: World,
    device: torch.device,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In bf16 our error is that of the modules, and a greedy token differs only near a tie."""
    comparison = Comparison(world, exact)
    schedules = st.lists(calls(prompts(world), 24), min_size=4, max_size=9)

    few = request.config.getoption("--schedules")
    num = few or NUM_SCHEDULES[comparison.dtype]

    @settings(derandomize=True, max_examples=num, deadline=None, phases=[Phase.generate])
    @given(schedules, st.fixed_dictionaries(LIMITS))
    def compare_all(schedule: list[Call], limits: dict[str, int]) -> None:
        max_model_len = min(limits["room"], 256)
        answered, engine = run(world, schedule, max_model_len=max_model_len, **limits)
        comparison.check(answered, engine)

    compare_all()
    counts = comparison.counts
    measured = {"device": str(device), "dtype": str(comparison.dtype), **counts}
    measured |= {"largest gap": comparison.max_gap, "rounding": str(comparison.rounding)}
    for name, value in measured.items():
        record_property(name, value)
    with capsys.disabled():
        sys.stderr.write(
            f"\n{comparison.dtype}: {dict(counts)}, largest gap {comparison.max_gap:.4f}, "
            f"{comparison.rounding}\n"
        )
    if comparison.dtype == torch.float32 and not few:
        assert counts["preemptions"] > 0, "the schedules must include preemptions"
        assert counts["cached tokens"] > 0, "the schedules must hit the prefix cache"
    assert counts["at a border"] <= counts["sequences"] / 50
    if comparison.dtype == torch.bfloat16:
        rounding = comparison.rounding
        assert rounding.ratio <= MAX_RATIO, rounding
        # Two log-probabilities change places only if their errors span the gap between them.
        assert comparison.max_gap <= 2 * MAX_RATIO * rounding.largest, rounding
