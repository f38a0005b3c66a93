"""The engines that the conformance suite runs against.

To add an engine, write a function that makes one and put it into ENGINES.
"""

import random
from collections.abc import AsyncIterator

import pytest
import tiny
from scripted_engine import TINY, Ending, ScriptedEngine

from server.engine.inference_engine import InferenceEngine
from server.engine.native.async_engine import AsyncEngine
from server.engine.request import FinishReason, Request

MAX_QUEUE = 8
WORDS = ("the ", "naïve ", "café ", "is ", "free ", "and ", "the other ", "answers ")


class DrawnEngine(ScriptedEngine):
    """A scripted engine whose text depends on the prompt, the adapters and the seed only."""

    def pieces(self, request: Request, index: int) -> list[str]:
        sampling = request.sampling
        seed = None
        if sampling.temperature > 0:
            seed = (sampling.seed or 0) + index
        draw = random.Random(repr((request.prompt_ids, request.selection, seed)))
        words = [draw.choice(WORDS) for _ in range(sampling.max_tokens)]
        return _cut("".join(words), words, sampling.stop)

    def last(self, request: Request) -> Ending:
        if request.sampling.stop:
            return FinishReason.STOP, None
        return FinishReason.LENGTH, None


def _cut(text: str, words: list[str], stop: tuple[str, ...]) -> list[str]:
    """The words of a text up to its first stop string; that is left out."""
    found = [text.index(each) for each in stop if each in text]
    if not found:
        return words
    kept: list[str] = []
    num_left = min(found)  # characters
    for word in words:
        kept.append(word[:num_left])
        num_left -= len(kept[-1])
        if num_left == 0:
            break
    return kept


def native_engine() -> InferenceEngine:
    """The native engine on the tiny model."""
    core, _ = tiny.make_engine(tiny.injection(), {}, max_num_seqs=4)
    return AsyncEngine(core, TINY, MAX_QUEUE)


def scripted_engine() -> InferenceEngine:
    """The engine that the tests of the routes use."""
    return DrawnEngine(max_queue=MAX_QUEUE, max_length=400)


ENGINES = {"native": native_engine, "scripted": scripted_engine}


@pytest.fixture(params=ENGINES)
async def engine(request: pytest.FixtureRequest) -> AsyncIterator[InferenceEngine]:
    """A running engine with three tasks and two backbones registered; closed afterwards."""
    engine = ENGINES[request.param]()
    for digest, adapter in tiny.adapters(tiny.injection()).items():
        engine.register(digest, lambda adapter=adapter: adapter, 1000)
    yield engine
    await engine.close()
