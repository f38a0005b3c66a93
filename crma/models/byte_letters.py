"""How byte-level tokenizers (GPT-2, Llama 3, Qwen) spell bytes."""

from functools import cache

_PRINTED = (range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100))
_FIRST = 0x100  # the letter of the first byte that has no printed form of its own


@cache
def letters_of_bytes() -> dict[int, str]:
    """Each byte's letter: its own character, or one beyond Latin-1 where that is not printed."""
    printed = {byte for each in _PRINTED for byte in each}
    hidden = [byte for byte in range(256) if byte not in printed]
    moved = {byte: chr(_FIRST + number) for number, byte in enumerate(hidden)}
    return {byte: moved.get(byte, chr(byte)) for byte in range(256)}
