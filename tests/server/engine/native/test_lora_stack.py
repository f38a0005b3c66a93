"""server.engine.native.lora_stack: rows of many adapters, each multiplied by its own."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import tiny
import tiny_configs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crma.method.frozen_linear import Affine
from crma.method.lora import Lora
from server.engine.native import lora_stack
from server.engine.native.adapter_weights import prepare
from server.engine.native.decoder import Decoder
from server.engine.native.lora_stack import MAX_FEW, LoraStack, Site, StackedRows

INJECTION = tiny.injection()
SHAPES = INJECTION.all_shapes
SITES = Decoder(INJECTION.model).sites
EMBEDDING, _, QKV = SITES[:3]
CPU = torch.device("cpu")
DIGESTS = ("task-0", "task-1", "task-2", "task-3")  # the last is a DoRA

Digests = Sequence[str | None]


def served() -> dict[str, Lora]:
    loras = {}
    for digest in DIGESTS:
        weights = prepare(tiny.adapters(INJECTION)[digest], INJECTION)
        assert isinstance(weights, Lora)
        loras[digest] = weights
    return loras


LORAS = served()


def of(loras: dict[str, Lora], digests: Digests) -> dict[str, Lora]:
    """The adapters of some rows."""
    return {digest: loras[digest] for digest in dict.fromkeys(digests) if digest is not None}


def stack_of(loras: dict[str, Lora]) -> LoraStack:
    stack = LoraStack(SITES, SHAPES)
    stack.hold(loras)
    return stack


def inputs(site: Site, num_rows: int) -> tuple[Tensor, Tensor]:
    """Random outputs of the site's linears, and their input."""
    generator = torch.Generator().manual_seed(num_rows)
    y = torch.randn(num_rows, sum(SHAPES[path][0] for path in site), generator=generator)
    if site == EMBEDDING:
        return y, torch.randint(tiny_configs.VOCAB, (num_rows,), generator=generator)
    return y, torch.randn(num_rows, SHAPES[site[0]][1], generator=generator)


def alone(lora: Lora, site: Site, y: Tensor, x: Tensor) -> Tensor:
    """What an adapter makes of the outputs y [b, out] of a site."""
    parts = list(y.split([SHAPES[path][0] for path in site], dim=1))
    for index, path in enumerate(site):
        if path not in lora.pairs:
            continue
        pair = lora.pairs[path]
        if isinstance(pair.output, Affine):
            parts[index] = pair.output.applied(parts[index], None)
        parts[index] = parts[index] + pair.delta(x)
    return torch.cat(parts, dim=1)


def check(stack: LoraStack, loras: dict[str, Lora], digests: Digests) -> None:
    """Every row of every site gets what its adapter gives it alone."""
    rows = StackedRows(stack, digests, CPU)
    for site in SITES:
        y, x = inputs(site, len(digests))
        changed = y.clone()
        rows.add_(site, changed, x)
        for row, digest in enumerate(digests):
            own = slice(row, row + 1)
            expected = y[own] if digest is None else alone(loras[digest], site, y[own], x[own])
            torch.testing.assert_close(changed[own], expected, atol=1e-4, rtol=1e-5)


def test_every_row_gets_its_own_adapter_in_any_order() -> None:
    """Also in groups of few rows beside one of many."""
    few = ["task-3", None, "task-1", "task-0", "task-3", None, "task-2"]
    many = ["task-1"] * (MAX_FEW + 5)
    for digests in (few, few[:1], [*few, *many], [None, *many]):
        check(stack_of(of(LORAS, digests)), LORAS, digests)


def test_rows_without_an_adapter_keep_their_bits() -> None:
    stack = stack_of(LORAS)
    rows = StackedRows(stack, ["task-3", None, "task-1"], CPU)
    for site in SITES:
        y, x = inputs(site, 3)
        changed = y.clone()
        rows.add_(site, changed, x)
        assert torch.equal(changed[1], y[1])


def test_no_row_meets_the_weights_of_its_neighbours_adapters() -> None:
    """They once met them with zeros, and infinity · 0 is NaN."""
    pairs = {
        path: replace(pair, B=pair.B * torch.inf) for path, pair in LORAS["task-1"].pairs.items()
    }
    loras = {**LORAS, "task-1": Lora(LORAS["task-1"].config, pairs)}
    digests = ["task-0", "task-1", "task-2", "task-1"]
    rows = StackedRows(stack_of(of(loras, digests)), digests, CPU)
    for site in SITES:
        y, x = inputs(site, 4)
        rows.add_(site, y, x)
        assert y[0::2].isfinite().all()


def test_an_adapter_is_copied_once_whatever_runs_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All were copied whenever a step had one that the last ones had not."""
    copied: list[int] = []
    plain = LoraStack._write

    def write(self: LoraStack, slot: int, lora: Lora) -> None:
        copied.append(slot)
        plain(self, slot, lora)

    monkeypatch.setattr(LoraStack, "_write", write)
    stack = LoraStack(SITES, SHAPES)
    for digests in (["task-0", "task-1"], ["task-1", "task-2"], ["task-2"], ["task-1"]):
        stack.hold(of(LORAS, digests))
    assert copied == [0, 1, 0]


def test_the_slot_of_the_adapter_that_was_not_used_for_longest_is_taken() -> None:
    stack = LoraStack(SITES, SHAPES)
    for digests in (DIGESTS[:3], ["task-0"], ["task-3"]):
        stack.hold(of(LORAS, digests))
    assert list(stack.slots) == ["task-2", "task-0", "task-3"]
    assert sorted(stack.slots.values()) == [0, 1, 2]


def test_a_site_is_as_wide_as_the_highest_rank_in_the_slots() -> None:
    """A large adapter that has left does not slow the small ones down for ever."""
    small, large = tiny.lora(INJECTION, 2, "all-linear"), tiny.lora(INJECTION, 16, "all-linear")
    stack = LoraStack(SITES, SHAPES)
    widths = []
    for digest, lora in (("small", small), ("large", large), ("other", small)):
        stack.hold({digest: lora})
        widths.append(stack.sites[QKV].A.shape[1])
    assert widths == [6, 48, 6]


@settings(derandomize=True, max_examples=25, deadline=None)
@given(
    batches=st.lists(
        st.lists(st.sampled_from([None, *DIGESTS]), min_size=1, max_size=6), min_size=1, max_size=5
    )
)
def test_nothing_of_an_adapter_stays_in_a_slot_that_another_takes(
    batches: list[list[str | None]],
) -> None:
    stack = LoraStack(SITES, SHAPES)
    for digests in batches:
        used = of(LORAS, digests)
        stack.hold(used)
        assert used.keys() <= stack.slots.keys()
        check(stack, LORAS, digests)


def test_a_copy_that_fails_leaves_a_stack_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(of(LORAS, DIGESTS[:2]))

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(lora_stack._SlottedSite, "write", fail)
        with pytest.raises(MemoryError):
            stack.hold(of(LORAS, DIGESTS[1:3]))
    stack.hold(of(LORAS, DIGESTS[:3]))
    check(stack, LORAS, DIGESTS[:3])
