"""How large the KV cache is: as the operator says, or as the memory has room for."""

from dataclasses import dataclass

from crma.core.errors import ConfigError

DEFAULT_TOKENS = 8192
FREE_SHARE = 0.8  # of a device's free memory; steps and adapters need the rest
MIB = 2**20


@dataclass(frozen=True)
class KvSize:
    """What the operator says of the size; at most one of the two.

    Attributes:
        tokens: that the cache holds.
        mib: that it takes.
    """

    tokens: int | None = None
    mib: int | None = None

    def num_blocks(
        self,
        block_bytes: int,
        block_size: int,
        *,
        free_bytes: int | None = None,
        useful_tokens: int = DEFAULT_TOKENS,
    ) -> int:
        """How many blocks the cache has, with its null block.

        Where the operator says nothing, it is for DEFAULT_TOKENS; or for as many of
        `useful_tokens` as FREE_SHARE of `free_bytes` holds, if those are more.

        Args:
            block_bytes: keys and values of a block.
            block_size: tokens of a block.
            free_bytes: of a device that has memory of its own; None: it has not.
            useful_tokens: more would stay empty.
        """
        if self.mib is not None:
            return self.mib * MIB // block_bytes
        num_blocks = 1 + -(-(self.tokens or DEFAULT_TOKENS) // block_size)
        if self.tokens is not None or free_bytes is None:
            return num_blocks
        useful = 1 + -(-useful_tokens // block_size)
        return max(num_blocks, min(useful, int(free_bytes * FREE_SHARE) // block_bytes))

    def check(self, max_model_len: int, block_bytes: int, block_size: int) -> None:
        """Check that a sequence fits, of `max_model_len` tokens. Other arguments as `num_blocks`.

        Raises:
            ConfigError: it does not; the error names the setting.
        """
        least = 1 + -(-max_model_len // block_size)
        if self.mib is not None and self.num_blocks(block_bytes, block_size) < least:
            raise _too_small("kv_cache_mib", self.mib, f">= {-(-least * block_bytes // MIB)}")
        tokens = self.tokens or DEFAULT_TOKENS
        if self.mib is None and tokens < max_model_len:
            raise _too_small("kv_cache_tokens", tokens, f">= max_model_len, {max_model_len}")


def _too_small(field: str, value: int, allowed: str) -> ConfigError:
    message = f"{field} is too small: one sequence of max_model_len tokens must fit"
    return ConfigError(message, field=field, value=value, allowed=allowed)
