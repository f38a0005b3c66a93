"""Memory in huge pages, of which parts are handed out."""

import math
import mmap
import re
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from server.engine.native import huge_pages
from server.engine.native.huge_pages import CACHE_LINE, HUGE_PAGE, HugePages
from server.engine.native.kv_cache import make_cache

THP = Path("/sys/kernel/mm/transparent_hugepage")
DTYPES = st.sampled_from([torch.bfloat16, torch.int8, torch.float32])
SHAPES = st.lists(st.integers(0, 40), min_size=1, max_size=3)


@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=8))
def test_parts_keep_their_own_values_and_begin_at_cache_lines(
    wanted: list[tuple[list[int], torch.dtype]],
) -> None:
    memory = HugePages()
    parts = [memory.empty(shape, dtype) for shape, dtype in wanted]
    for number, part in enumerate(parts):
        part.fill_(number)
    for number, (part, (shape, dtype)) in enumerate(zip(parts, wanted, strict=True)):
        assert part.dtype == dtype
        assert list(part.shape) == shape
        assert part.data_ptr() % CACHE_LINE == 0 or part.numel() == 0
        assert torch.equal(part, torch.full(shape, number, dtype=dtype))


def test_parts_lie_one_after_the_other_until_a_reservation_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huge_pages, "MIN_RESERVED", HUGE_PAGE)
    memory = HugePages()
    first, second = (memory.empty((1000,), torch.int8) for _ in range(2))
    assert second.data_ptr() == first.data_ptr() + 1024
    first.fill_(1)
    second.fill_(2)
    larger = memory.empty((3, HUGE_PAGE), torch.int8).fill_(3)
    assert larger.sum(dtype=torch.int64) == 3 * math.prod(larger.shape)
    assert (first == 1).all()
    assert (second == 2).all()


def test_a_part_outlives_what_handed_it_out() -> None:
    part = HugePages().empty((100,), torch.int8).fill_(7)
    others = [HugePages().empty((100,), torch.int8).fill_(1) for _ in range(20)]
    assert len(others) == 20
    assert torch.equal(part, torch.full((100,), 7, dtype=torch.int8))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
def test_a_reservation_begins_at_a_huge_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its first and last megabyte would be in small ones.

    Newer kernels align what is as long as some huge pages, so the least is another length here.
    """
    monkeypatch.setattr(huge_pages, "MIN_RESERVED", 4096)
    weights = [HugePages().empty((1,), torch.int8) for _ in range(3)]
    model = tiny.injection().model
    caches = [make_cache(model, num_blocks=4, block_size=4) for _ in range(3)]
    assert [each.data_ptr() % HUGE_PAGE for each in (*weights, *caches)] == [0] * 6


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
def test_memory_that_the_system_does_not_give_is_named() -> None:
    with pytest.raises(MemoryError, match="1099511627776 MiB for weights or the KV cache"):
        HugePages().empty((1 << 60,), torch.int8)


@pytest.mark.skipif(not THP.exists(), reason="no huge pages")
def test_linux_is_asked_for_huge_pages() -> None:
    part = HugePages().empty((10,), torch.int8)
    smaps = Path("/proc/self/smaps").read_text()
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", smaps, flags=re.MULTILINE)[1:]:
        first, last = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if first <= part.data_ptr() < last:
            assert "hg" in mapping.rpartition("VmFlags:")[2].split()
            return
    pytest.fail("no mapping has the part")


def test_another_system_gives_plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows cannot be asked."""
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory = HugePages()
    parts = [memory.empty((3, 5), torch.float32).fill_(number) for number in range(3)]
    assert [part.sum().item() for part in parts] == [0, 15, 30]
