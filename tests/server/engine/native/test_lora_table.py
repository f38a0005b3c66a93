"""server.engine.native.lora_table: the kernel reads adapters where they are."""

import gc
from weakref import ref

import tiny
import torch
from dora import dora

from crma.method.frozen_linear import Affine
from crma.method.lora import Lora
from server.engine.native.adapter_weights import prepare
from server.engine.native.decoder import Decoder
from server.engine.native.lora_table import LoraTables

SHAPES = tiny.injection().all_shapes


def tables() -> LoraTables:
    return LoraTables(Decoder(tiny.injection().model).sites, SHAPES)


def served(which: str = "all-linear", seed: int = 0) -> Lora:
    lora = prepare(tiny.lora(tiny.injection(), 3, which, seed), tiny.injection())
    assert isinstance(lora, Lora)
    return lora


def test_a_table_says_where_each_pair_is_and_copies_nothing() -> None:
    lora = served()
    found = tables()
    table = found.find("a", lora).table
    for site, (index, columns) in found.places.items():
        pairs = [lora.pairs[path] for path in site if path in lora.pairs]
        for row, pair, start in zip(table[index].tolist(), pairs, columns, strict=False):
            out, rank = pair.B.shape
            assert row == [pair.A.data_ptr(), pair.B.data_ptr(), rank, start, out, 0, 0]
        assert not table[index, len(pairs) :].any()


def test_a_table_says_where_the_rescaling_of_a_dora_is() -> None:
    inj = tiny.injection()
    lora = prepare(dora(inj, 3), inj)
    assert isinstance(lora, Lora)
    found = tables()
    table = found.find("a", lora).table
    for site, (index, _) in found.places.items():
        for entry, path in zip(table[index].tolist(), site, strict=False):
            output = lora.pairs[path].output
            assert isinstance(output, Affine)
            assert entry[5:] == [output.scale.data_ptr(), output.shift.data_ptr()]


def test_a_site_is_known_only_where_an_adapter_has_a_pair() -> None:
    lora = served("first")
    known = tables().find("a", lora)
    assert all(not lora.pairs.keys().isdisjoint(site) for site in known.sites)
    assert len(known.sites) == len(lora.pairs)


def test_a_table_is_made_once_and_again_for_other_weights() -> None:
    found, lora = tables(), served()
    table = found.find("a", lora).table
    assert found.find("a", lora).table is table
    other = served(seed=1)
    assert not torch.equal(found.find("a", other).table, table)


def test_a_table_keeps_no_adapter_in_memory() -> None:
    found, lora = tables(), served()
    found.find("a", lora)
    alive = ref(lora.pairs.popitem()[1].A)
    del lora
    gc.collect()
    assert alive() is None
    found.find("b", served())
    assert list(found._known) == ["b"]
