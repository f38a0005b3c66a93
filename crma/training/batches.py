"""The order of the training examples."""

import hashlib
import random
from collections.abc import Sequence

from crma.evaluation.evaluator import Encoded

WINDOW = 8  # batches that are sorted by length together


def epoch_batches(rows: Sequence[Encoded], batch_size: int, key: str) -> list[list[int]]:
    """Divide one epoch into random batches of rows of similar length.

    Rows are shuffled, sorted by length within windows of WINDOW batches (which saves padding and
    stays random), and the batches are shuffled again.

    Args:
        rows: the training examples.
        batch_size: rows in a batch; the last batch of the last window may have fewer.
        key: seeds the order; the same key gives the same order on every machine.

    Returns:
        Batches of indices into `rows`, each index once.
    """
    seed = hashlib.sha256(key.encode()).digest()[:8]
    rng = random.Random(int.from_bytes(seed, "big"))
    order = list(range(len(rows)))
    rng.shuffle(order)

    def length(index: int) -> int:
        return len(rows[index].prompt) + len(rows[index].answer)

    window = WINDOW * batch_size
    batches = []
    for start in range(0, len(order), window):
        similar = sorted(order[start : start + window], key=length)
        batches += [similar[i : i + batch_size] for i in range(0, len(similar), batch_size)]
    rng.shuffle(batches)
    return batches
