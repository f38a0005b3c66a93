"""The check at the start: does every request get its own adapters, whatever runs beside it?

vLLM 0.32 on CPUs gives rows of the base model another request's adapter once all slots are full
(`base_rows.py`), and a model without taps would serve every CRMA backbone as the base model. So
the base model, a task, a backbone and both together answer alone, and then in one batch, with all
slots full.

The tokens are prescribed by a bias, which log-probabilities do not have: rounding cannot change an
answer's course, and every position can be compared.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from crma.core.selection import BASE, AdapterSelection
from crma.method.backbone import Backbone, CrmaConfig
from crma.method.injection import Injection
from crma.method.lora import Lora, LoraConfig, LoraPair
from server.engine.errors import EngineStopped
from server.engine.request import Request, SamplingParams

if TYPE_CHECKING:
    from server.engine.vllm.engine import VllmEngine

logger = logging.getLogger(__name__)

NUM_TOKENS = 8  # of each answer: enough for steps in which all of them decode
TOLERANCE = {torch.float32: 1e-3}
COARSE_TOLERANCE = 0.15  # of a narrower dtype, whose sums depend on the shape of a batch
EFFECT = 5.0  # times the tolerance: what each adapter changes at least
SIZE = 0.3  # of a delta, as a share of what it is added to, roughly
NAME = "self-check"

Answer = list[float]


async def check_rows(engine: VllmEngine, injection: Injection, max_loras: int) -> None:
    """Run the check, and leave no adapter of it behind.

    Raises:
        EngineStopped: an answer differs, or an adapter has no effect; or a step failed.
    """
    others = max(0, max_loras - 3)
    tasks = [f"{NAME}-task-{index}" for index in range(1 + others)]
    backbone = f"{NAME}-crma"
    for seed, digest in enumerate(tasks):
        engine.register(digest, partial(_lora, injection, seed), 0)
    engine.register(backbone, partial(_backbone, injection), 0)
    try:
        await _check(engine, injection, tasks, backbone)
    finally:
        for digest in (*tasks, backbone):
            await engine.unload(digest, wait_s=60.0)


async def _check(
    engine: VllmEngine, injection: Injection, tasks: Sequence[str], backbone: str
) -> None:
    task, *others = tasks
    selections = (
        BASE,
        AdapterSelection(task),
        AdapterSelection(None, backbone),
        AdapterSelection(task, backbone),
    )
    prompt = _prompt(engine)
    alone = [await _ask(engine, prompt, selection) for selection in selections]
    for other in others:  # now every slot has held an adapter
        await _ask(engine, prompt, AdapterSelection(other), num_tokens=1)
    together = await asyncio.gather(*(_ask(engine, prompt, each) for each in selections))
    tolerance = TOLERANCE.get(injection.model.dtype, COARSE_TOLERANCE)
    effects = [_distance(a, b) for a, b in itertools.combinations(alone, 2)]
    if min(effects) < EFFECT * tolerance:
        raise EngineStopped(
            f"the self-check failed: an adapter changes log-probabilities by {min(effects):.2g} "
            "only; has vLLM loaded the plugin `crma` (VLLM_PLUGINS)?"
        )
    for selection, single, batched in zip(selections, alone, together, strict=True):
        distance = _distance(single, batched)
        if distance > tolerance:
            raise EngineStopped(
                f"the self-check failed: {selection.variant} beside other requests differs from "
                f"{selection.variant} alone by {distance:.2g} in log-probabilities (allowed: "
                f"{tolerance}); vLLM mixes up adapters on this machine"
            )
    logger.info(
        "self-check: largest difference between a batch and alone %.2g, smallest effect %.2g",
        max(map(_distance, alone, together)),
        min(effects),
    )


def _prompt(engine: VllmEngine) -> tuple[int, ...]:
    """Tokens of a prompt; any will do."""
    last = engine.model.num_tokens - 1
    return tuple(min(token, last) for token in range(20, 36))


async def _ask(
    engine: VllmEngine,
    prompt: tuple[int, ...],
    selection: AdapterSelection,
    num_tokens: int = NUM_TOKENS,
) -> Answer:
    """The log-probabilities of a prescribed answer. Raises EngineStopped: there is none."""
    forced = prompt[0]
    sampling = SamplingParams(
        max_tokens=num_tokens, ignore_eos=True, logprobs=0, logit_bias=((forced, 100.0),)
    )
    name = f"{NAME}-{selection.task_digest}-{selection.crma_digest}"
    request = Request(name, prompt, sampling=sampling, selection=selection)
    found: Answer = []
    async for output in engine.submit(request):
        if output.error is not None:
            raise EngineStopped(f"the first steps failed: {output.error}")
        found += [each.logprob for each in output.logprobs]
    return found


def _distance(one: Answer, other: Answer) -> float:
    """The largest difference at a position; infinite where the lengths differ."""
    if len(one) != len(other):
        return float("inf")
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _lora(injection: Injection, seed: int) -> Lora:
    """A random LoRA of rank 2 on every linear."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, (out_features, in_features) in injection.shapes.items():
        A = torch.randn(2, in_features, generator=generator) / in_features**0.5
        B = torch.randn(out_features, 2, generator=generator) * SIZE
        pairs[path] = LoraPair(A, B, 1.0)
    names = tuple(sorted({path.rpartition(".")[2] for path in pairs}))
    return Lora(LoraConfig(2, 2.0, names), pairs)


def _backbone(injection: Injection) -> Backbone:
    """A random backbone; unlike a new one it is not the identity."""
    generator = torch.Generator().manual_seed(0)
    config = CrmaConfig(len(injection.blocks), injection.hidden_size, num_streams=1, stream_rank=2)
    made = Backbone(config, generator)
    with torch.no_grad():
        made.W.normal_(std=SIZE, generator=generator)
    return made
