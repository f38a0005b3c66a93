"""The rows of a batch in tiles, for attention over the blocks of the cache where they lie.

A tile has ROWS rows of one sequence, the last one again where the sequence has fewer. So a decoding
sequence is one tile, and a chunk of a prompt is some. A tile reads the blocks of its sequence up to
its last row and no others: what a row gets does not depend on other sequences, and nothing is
copied but the queries.

Shapes: as in kv_cache.py; D tiles, P = D · ROWS rows of tiles, S sequences of the batch. D, S and m
are padded to multiples of PADDING, so that one compiled program serves all batches.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from server.engine.native.block_pool import NULL_BLOCK
from server.engine.native.step import Chunk

ROWS = 16  # of a tile: the fewest that a GPU's matrix instructions take
PADDING = 8


@dataclass(frozen=True)
class Tiles:
    """The rows of a batch in tiles. All tensors are int32 but `rows` and `places`.

    Attributes:
        rows: [P], the row of the batch that each row of a tile is.
        places: [T], a row of a tile where each row of the batch is.
        positions: [P], of each row's token in its sequence.
        sequences: [D], each tile's sequence, of S.
        ranks: [S, N], the place of each block of the cache in a sequence; -1: it is not of it.
        num_blocks: [1, 1, D], how many blocks a tile reads.
        blocks: [1, 1, D, m], these blocks; the rest is not read.
    """

    rows: Tensor
    places: Tensor
    positions: Tensor
    sequences: Tensor
    ranks: Tensor
    num_blocks: Tensor
    blocks: Tensor


@dataclass
class _Layout:
    """The same as lists, without the padding.

    tables: the blocks of each tile. owned: those of each sequence.
    """

    block_size: int
    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    owned: list[list[int]] = field(default_factory=list)

    def add(self, chunk: Chunk) -> None:
        """Put the tokens of one more sequence into tiles of their own."""
        for start in range(chunk.start, chunk.stop, ROWS):
            count = min(ROWS, chunk.stop - start)
            own = range(len(self.places), len(self.places) + count)
            self.places += range(len(self.rows), len(self.rows) + count)
            self.rows += [*own, *[own[-1]] * (ROWS - count)]
            self.positions += range(start, start + count)
            self.positions += [start + count - 1] * (ROWS - count)
            self.sequences.append(len(self.owned))
            self.tables.append(self._table(chunk, start + count))
        self.owned.append(self._table(chunk, chunk.stop))

    def _table(self, chunk: Chunk, stop: int) -> list[int]:
        """The blocks that hold the positions before `stop`."""
        return chunk.sequence.block_table[: -(-stop // self.block_size)]


def make_tiles(chunks: Iterable[Chunk], cache: Tensor) -> Tiles:
    """Lay the tokens of a batch, chunk after chunk, out in tiles.

    Args:
        cache: [L, N, z, 2h, e]; its device is that of the tiles.
    """
    device = cache.device
    layout = _Layout(block_size=cache.shape[2])
    for chunk in chunks:
        layout.add(chunk)
    empty = -len(layout.tables) % PADDING
    width = max(map(len, layout.tables))
    width += -width % PADDING
    tables = [table + [NULL_BLOCK] * (width - len(table)) for table in layout.tables]
    tables += [[NULL_BLOCK] * width] * empty
    counts = [len(table) for table in layout.tables] + [0] * empty
    no_rows = [0] * (empty * ROWS)
    int32 = partial(torch.tensor, dtype=torch.int32, device=device)
    return Tiles(
        rows=torch.tensor(layout.rows + no_rows, device=device),
        places=torch.tensor(layout.places, device=device),
        positions=int32(layout.positions + no_rows),
        sequences=int32(layout.sequences + [0] * empty),
        ranks=_ranks(layout.owned, cache),
        num_blocks=int32(counts)[None, None],
        blocks=_widened(int32(tables), cache)[None, None],
    )


def _ranks(owned: list[list[int]], cache: Tensor) -> Tensor:
    """The places [S, N] of the blocks of each sequence."""
    device = cache.device
    num_blocks = cache.shape[1]
    num_sequences = len(owned) + -len(owned) % PADDING
    ranks = torch.full((num_sequences, num_blocks), -1, dtype=torch.int32, device=device)
    indices: list[int] = []
    places: list[int] = []
    for index, table in enumerate(owned):
        indices += [index * num_blocks + block for block in table]
        places += range(len(table))
    found = torch.tensor(places, dtype=torch.int32, device=device)
    ranks.view(-1).index_copy_(0, torch.tensor(indices, device=device), found)
    return ranks


def _widened(tables: Tensor, cache: Tensor) -> Tensor:
    """[D, m], or, on a CPU, [D, N]: there torch's program wants a column for every block."""
    missing = cache.shape[1] - tables.shape[1]
    if cache.device.type != "cpu" or missing <= 0:
        return tables
    return pad(tables, (0, missing))
