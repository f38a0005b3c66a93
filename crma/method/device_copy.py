"""Copies of an adapter's tensors on the device that serves."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The tensor on a device in a dtype: itself, if it is so already.

    A GPU gets it from pinned memory and without waiting, in the order of the thread's current
    stream.
    """
    if tensor.device.type != "cpu" or torch.device(device).type != "cuda":
        return tensor.to(device, dtype)
    return tensor.to(dtype).pin_memory().to(device, non_blocking=True)
