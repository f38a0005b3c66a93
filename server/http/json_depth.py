"""How deep JSON nests, found out before it is read."""

import re

import numpy as np

# A text, which may hold brackets of its own.
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OPENING = np.frombuffer(b"[{", np.uint8)


def depth_of(text: bytes) -> int:
    """The most objects and lists of JSON that lie in one another.

    It takes about 10 ms for a MiB, however deep: much of what reads JSON takes far longer for depth
    than for length, or fails. Of a text that is no JSON, the depth of its brackets.
    """
    brackets = np.frombuffer(_TEXT.sub(b"", text).translate(None, _NO_BRACKETS), np.uint8)
    opens = np.isin(brackets, _OPENING)
    return int(np.where(opens, 1, -1).cumsum().max(initial=0))
