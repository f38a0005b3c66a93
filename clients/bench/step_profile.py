"""Where the time of a step of the engine goes, beside what the machine's limits allow.

Every running sequence gets one token, and none has an adapter. The parts:

- `linears`: the products of the blocks
- `head`: the product of the head
- `attention`: scores and sums over the cached positions
- `sampling`: from logits to tokens
- `scheduling`: the choice of what the step computes, its accounts, and the text of its tokens
- `rest`: norms, rotations, gates, the embedding, the batch's tensors, and Python
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedTokenizerBase

from bench.limits import NUM_OF_HEAD, NUM_WITHOUT_HEAD
from crma.method.injection import Injection
from server.engine.native import decoder as decoder_module
from server.engine.native.adapter_pool import AdapterPool
from server.engine.native.block_pool import BlockPool
from server.engine.native.engine import Engine
from server.engine.native.kernel import Kernel
from server.engine.native.kv_cache import attend
from server.engine.native.launch import BLOCK_SIZE
from server.engine.native.model_runner import ModelRunner
from server.engine.native.packed_blocks import PARTS as KERNEL_PARTS
from server.engine.native.packed_blocks import PackedBlocks
from server.engine.native.scheduler import Scheduler
from server.engine.native.step_results import StepResults
from server.engine.native.step_runner import StepRunner
from server.engine.request import Request, SamplingParams

PARTS = ("linears", "head", "attention", "sampling", "scheduling", "rest")
MAX_STEPS = 256  # for which each sequence has room
MAX_BATCHED_TOKENS = 512
Projection = decoder_module._Projection


class StepClock:
    """The milliseconds of one step, and of its parts.

    Args:
        engine: has something to decode.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._taken: dict[str, float] = {}

    def parts(self) -> dict[str, float]:
        """Run a step, and say what each of `PARTS` took."""
        self._taken = dict.fromkeys((*PARTS, "pass"), 0.0)
        with self._watching():
            total = step_ms(self._engine)
        taken = self._taken
        in_pass = taken.pop("pass")
        taken["scheduling"] = total - in_pass
        taken["rest"] = in_pass - sum(
            taken[part] for part in ("linears", "head", "attention", "sampling")
        )
        return taken

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function whose time counts for a part."""

        def run(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = function(*arguments)
            self._taken[part] += 1e3 * (time.perf_counter() - begin)
            return result

        return run

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Measure the parts of what the engine computes in the block."""
        decoder = self._engine.runner.decoder
        assert decoder is not None
        in_blocks = self._timed("linears", Projection.__call__)
        at_end = self._timed("head", Projection.__call__)

        def multiply(projection: Any, *arguments: Any) -> Any:
            is_head = projection is decoder._head
            return (at_end if is_head else in_blocks)(projection, *arguments)

        timed_attend = self._timed("attention", attend)
        sample = self._timed("sampling", StepResults.of)
        with (
            self._asking_the_kernel(decoder.packed_blocks),
            patch.object(Projection, "__call__", multiply),
            patch.object(decoder_module, "attend", timed_attend),
            patch.object(StepResults, "of", sample),
            patch.object(StepRunner, "run", self._timed("pass", StepRunner.run)),
        ):
            yield

    @contextmanager
    def _asking_the_kernel(self, blocks: PackedBlocks | None) -> Iterator[None]:
        """Where the kernel computes all blocks at once, it says itself what their parts take."""
        if blocks is None:
            yield
            return
        blocks.taken = torch.zeros(len(KERNEL_PARTS), dtype=torch.int64)
        try:
            yield
            for part, nanoseconds in zip(KERNEL_PARTS, blocks.taken.tolist(), strict=True):
                if part in self._taken:
                    self._taken[part] += 1e-6 * nanoseconds
        finally:
            blocks.taken = None


class StepProfiler:
    """Measures steps of the default base model.

    Args:
        injection: the model; its weights are taken.
        tokenizer: the model's.
        kernel: computes the steps.
        limits: of `measure_limits`.
        max_rows: the most sequences of a step.
        context: tokens that each sequence has before.
        int8: weights of 8 bits.
    """

    def __init__(
        self,
        injection: Injection,
        tokenizer: PreTrainedTokenizerBase,
        kernel: Kernel,
        limits: Mapping[str, float],
        *,
        max_rows: int,
        context: int,
        int8: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._context = context
        self._int8 = int8
        num_tokens = context + MAX_STEPS
        blocks_of_one = -(-num_tokens // BLOCK_SIZE)
        self._blocks = BlockPool(1 + max_rows * blocks_of_one, BLOCK_SIZE)
        self._runner = ModelRunner(
            injection,
            AdapterPool(injection, 2),
            self._blocks,
            torch.get_num_threads(),
            take_weights=True,
            kernel=kernel,
            int8=int8,
        )

    def measure(self, rows: int, waiting: int, repetitions: int) -> dict[str, Any]:
        """Measure a step of so many sequences, beside a queue.

        Args:
            rows: sequences that decode.
            waiting: sequences in the queue, for which there is no room.
            repetitions: steps; figures are medians of them. At most a hundred.

        Returns:
            The step's milliseconds without and with the clock; and for each part its milliseconds,
            its share of the step, and the least that the limits allow.
        """
        engine = self._decoding(rows)
        for i in range(waiting):
            engine.add(_request(f"waiting {i}", 8))
        step_ms(engine)
        clock = StepClock(engine)
        plain = [step_ms(engine) for _ in range(repetitions)]
        watched = [clock.parts() for _ in range(repetitions)]
        for sequence in engine.scheduler.unfinished():
            engine.abort(sequence.request.id)
        of_parts = _medians(watched)
        whole = sum(of_parts.values())
        allowed = self._limit_ms(rows)
        limit = sum(allowed.values())
        return {
            "row": f"a step of {rows} rows",
            "context": self._context,
            "waiting": waiting,
            "int8": self._int8,
            "ms": median(plain),
            "ms_with_clock": whole,
            "limit_ms": limit,
            "share_of_limit": limit / median(plain),
            "parts": {
                part: {"ms": taken, "share": taken / whole, "limit_ms": allowed.get(part, 0.0)}
                for part, taken in of_parts.items()
            },
        }

    def _decoding(self, rows: int) -> Engine:
        """An engine in which so many sequences have computed their prompt."""
        scheduler = Scheduler(self._blocks, rows, max(MAX_BATCHED_TOKENS, rows))
        num_tokens = self._runner.injection.model.config.vocab_size
        max_model_len = self._context + MAX_STEPS
        engine = Engine(
            self._runner, scheduler, self._tokenizer, frozenset(), max_model_len, num_tokens
        )
        for i in range(rows):
            engine.add(_request(f"running {i}", self._context))
        while len(scheduler.running) < rows or any(s.is_prefilling for s in scheduler.running):
            engine.step()
        return engine

    def _limit_ms(self, rows: int) -> dict[str, float]:
        """Milliseconds of a machine that only reads and multiplies, of the parts with a limit.

        With weights of 8 bits only their reading is one: the rates are those of floating point.
        """
        bytes_a_second = self._limits["read_gb_s"] * 1e9
        operations_a_second = self._limits["gemm_gf_s"] * 1e9

        def of_weights(number: int) -> float:
            reading = number * (1 if self._int8 else 2) / bytes_a_second
            computing = 0.0 if self._int8 else 2 * number * rows / operations_a_second
            return 1e3 * max(reading, computing)

        cache = self._runner.kv
        layers, _, _, num_kv, size = cache.shape
        cached = rows * self._context * layers * num_kv * size * cache.dtype.itemsize
        return {
            "linears": of_weights(NUM_WITHOUT_HEAD),
            "head": of_weights(NUM_OF_HEAD),
            "attention": 1e3 * cached / bytes_a_second,
        }


def _medians(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each part."""
    found = {}
    for part in PARTS:
        found[part] = median([step[part] for step in steps])
    return found


def step_ms(engine: Engine) -> float:
    """Run a step in which every running sequence gets a token; the milliseconds that it took."""
    begin = time.perf_counter()
    outputs = engine.step()
    taken = 1e3 * (time.perf_counter() - begin)
    assert len(outputs) == len(engine.scheduler.running), "a sequence of the step ended"
    return taken


def _request(name: str, prompt_tokens: int) -> Request:
    prompt = tuple(i % 50 for i in range(prompt_tokens))
    return Request(name, prompt, sampling=SamplingParams(MAX_STEPS, ignore_eos=True))
