"""crma.training.batches: the order of the training examples."""

import pytest

from crma.evaluation.evaluator import Encoded
from crma.training.batches import epoch_batches

ROWS = [Encoded([0] * (i * 7 % 23 + 1), [1]) for i in range(50)]


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
def test_an_epoch_holds_every_example_once(batch_size: int) -> None:
    batches = epoch_batches(ROWS, batch_size, "0/a/0")
    assert sorted(i for batch in batches for i in batch) == list(range(50))
    sizes = sorted((len(batch) for batch in batches), reverse=True)
    assert sizes[:-1] == [batch_size] * (len(batches) - 1)


@pytest.mark.parametrize("batch_size", [1, 4, 16, 64])
def test_the_order_follows_from_the_key(batch_size: int) -> None:
    batches = epoch_batches(ROWS, batch_size, "0/a/0")
    assert epoch_batches(ROWS, batch_size, "0/a/0") == batches
    fits_one_batch = batch_size == 64  # sorted by length, with ties in random order
    assert epoch_batches(ROWS, batch_size, "0/a/1") != batches or fits_one_batch
