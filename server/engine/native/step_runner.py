"""Runs a step. A fault in it ends the sequences that it can be pinned to, and no others."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from server.engine.native.batch import Batch, build_batch
from server.engine.native.model_runner import ModelRunner
from server.engine.native.sequence import Sequence
from server.engine.native.step import Chunk, Step
from server.engine.native.step_results import StepResults
from server.engine.request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRunner:
    """A forward pass and its results, tried again without the sequences that fail.

    Args:
        runner: computes each chunk's tokens from the KV cache; computing them twice gives the same.
        num_tokens: only token ids below it are sampled.
        on_pass: called before each pass.
    """

    runner: ModelRunner
    num_tokens: int
    on_pass: Callable[[], None] = lambda: None

    def run(self, step: Step) -> StepResults:
        """Run a step of n chunks in one pass, or after a fault in at most 2 n - 1.

        A part that fails is halved until the fault is that of one sequence. If every part fails,
        every sequence of the step ends.
        """
        self.on_pass()
        try:
            batch = self._batch(step)
            logits = self.runner.run(batch, step.new_blocks)
        except Exception as error:
            logger.exception("a pass over %d sequences failed", len(step.chunks))
            if len(step.chunks) == 1:
                return StepResults(failed=[step.chunks[0].sequence])
            # Without this the frames of the fault keep its tensors until all parts have run.
            error.__traceback__ = None
        else:
            return StepResults.of(batch, logits, self.num_tokens)
        middle = len(step.chunks) // 2
        first = self.run(_part(step, step.chunks[:middle]))
        return first + self.run(_part(step, step.chunks[middle:]))

    def probe(self, block: int) -> Exception | None:
        """Compute one token of the base model. Returns the fault, if the model cannot do even that.

        Args:
            block: one that no sequence uses.
        """
        sequence = Sequence(Request("probe", prompt_ids=(0,)), 0)
        sequence.block_table = [block]
        self.on_pass()
        try:
            self.runner.run(self._batch(Step([Chunk(sequence, 0, 1)])), [block])
        except Exception as error:
            return error
        return None

    def _batch(self, step: Step) -> Batch:
        return build_batch(step, self.runner.kv, in_tiles=self.runner.in_tiles)


def _part(step: Step, chunks: list[Chunk]) -> Step:
    """A step of some of another's chunks, and of the new blocks that are theirs."""
    owned = {block for chunk in chunks for block in chunk.sequence.block_table}
    return Step(chunks, [block for block in step.new_blocks if block in owned])
