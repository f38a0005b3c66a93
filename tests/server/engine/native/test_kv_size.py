"""server.engine.native.kv_size: plain arithmetic, on any machine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crma.core.errors import ConfigError
from server.engine.native.kv_size import DEFAULT_TOKENS, FREE_SHARE, MIB, KvSize

BLOCK_SIZE = 16
BLOCK_BYTES = 16 * 46_080  # of SmolLM2-135M in float32
GIB = 2**30


@pytest.mark.parametrize("free_bytes", [None, 80 * GIB], ids=["cpu", "cuda"])
def test_the_operators_tokens_are_rounded_up_to_blocks_whatever_is_free(
    free_bytes: int | None,
) -> None:
    size = KvSize(tokens=4097)
    found = size.num_blocks(BLOCK_BYTES, BLOCK_SIZE, free_bytes=free_bytes, useful_tokens=10**6)
    assert found == 1 + 257


@pytest.mark.parametrize("free_bytes", [None, 80 * GIB], ids=["cpu", "cuda"])
def test_the_operators_mib_are_never_exceeded(free_bytes: int | None) -> None:
    found = KvSize(mib=100).num_blocks(BLOCK_BYTES, BLOCK_SIZE, free_bytes=free_bytes)
    assert found * BLOCK_BYTES <= 100 * MIB < (found + 1) * BLOCK_BYTES


def test_a_cpu_has_the_default_where_the_operator_says_nothing() -> None:
    assert KvSize().num_blocks(BLOCK_BYTES, BLOCK_SIZE, useful_tokens=10**6) == 1 + 512


@pytest.mark.parametrize(
    ("free_bytes", "useful_tokens", "tokens"),
    [
        (0, 131_072, DEFAULT_TOKENS),  # too little is no reason for less than before
        (80 * GIB, 131_072, 131_072),
        (80 * GIB, 4096, DEFAULT_TOKENS),
    ],
)
def test_a_device_gives_what_is_useful_and_at_least_the_default(
    free_bytes: int, useful_tokens: int, tokens: int
) -> None:
    found = KvSize().num_blocks(
        BLOCK_BYTES, BLOCK_SIZE, free_bytes=free_bytes, useful_tokens=useful_tokens
    )
    assert found == 1 + tokens // BLOCK_SIZE


@given(free_bytes=st.integers(10**9, 10**12), block_bytes=st.integers(1000, 10**6))
def test_a_device_keeps_room_for_its_steps(free_bytes: int, block_bytes: int) -> None:
    found = KvSize().num_blocks(block_bytes, BLOCK_SIZE, free_bytes=free_bytes, useful_tokens=2**40)
    assert found * block_bytes <= free_bytes * FREE_SHARE < (found + 1) * block_bytes


@given(
    mib=st.integers(1, 2000),
    max_model_len=st.integers(2, 20_000),
    block_bytes=st.integers(1000, 10**6),
)
def test_the_mib_that_an_error_allows_hold_a_sequence(
    mib: int, max_model_len: int, block_bytes: int
) -> None:
    size = KvSize(mib=mib)
    if (size.num_blocks(block_bytes, BLOCK_SIZE) - 1) * BLOCK_SIZE >= max_model_len:
        size.check(max_model_len, block_bytes, BLOCK_SIZE)
        return
    with pytest.raises(ConfigError) as caught:
        size.check(max_model_len, block_bytes, BLOCK_SIZE)
    assert (caught.value.field, caught.value.value) == ("kv_cache_mib", mib)
    least = int(str(caught.value.allowed).removeprefix(">= "))
    assert least > mib
    KvSize(mib=least).check(max_model_len, block_bytes, BLOCK_SIZE)
    with pytest.raises(ConfigError):
        KvSize(mib=least - 1).check(max_model_len, block_bytes, BLOCK_SIZE)


def test_the_default_too_has_to_hold_a_sequence() -> None:
    KvSize().check(DEFAULT_TOKENS, BLOCK_BYTES, BLOCK_SIZE)
    with pytest.raises(ConfigError, match="kv_cache_tokens") as caught:
        KvSize().check(DEFAULT_TOKENS + 1, BLOCK_BYTES, BLOCK_SIZE)
    assert caught.value.value == DEFAULT_TOKENS
