"""Whether a LoRA stays finite as it is served: scaled, and in the narrowest dtype that serves.

Finite weights can overflow: B = 3e38 does with a scaling of 2, and so do products of large A and B.
Such a pair gives no answer to anybody, so it is refused before it serves.

Shapes: A [r, in]; B [out, r].
"""

from crma.core.files import invalid
from crma.store.stored_tensor import StoredTensor

LARGEST = 2.0**128 - 2.0**120
"""The largest number in bfloat16, which is less than that in float32."""


def check_range(
    path: str, A: StoredTensor, B: StoredTensor, scaling: float, *, is_normed: bool
) -> None:
    """A pair cannot overflow on inputs of ordinary size: numbers whose average magnitude is 1.

    Args:
        path: of the linear, for the error.
        A: finite.
        B: finite.
        scaling: of the update.
        is_normed: the lengths of the rows of B A are computed too (DoRA), from their squares.

    Raises:
        InvalidAdapter: it could overflow.
    """
    rank, num_inputs = A.shape
    scaled = B.largest * abs(scaling)
    low_rank = A.largest * num_inputs
    update = scaled * rank * low_rank
    # `LoraPair.delta` scales the product with A, the server scales B: neither may overflow.
    scaled_low_rank = low_rank * max(1.0, abs(scaling))
    largest = max(scaled, scaled_low_rank, update, update * update if is_normed else 0.0)
    if largest > LARGEST:
        message = "The weights overflow as they are served: scaled, in bfloat16."
        allowed = f"A and B times scaling, and their product, below {LARGEST:.3g}"
        raise invalid(message, path, f"{largest:.3g}", allowed)
