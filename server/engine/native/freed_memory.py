"""Gives memory that was freed back to the system, where the C library keeps it otherwise."""

import ctypes


def return_freed_memory() -> None:
    """Return what was freed to the system: loading a model leaves a third of its size behind.

    Only glibc has to be told. Others have no such function, and nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
