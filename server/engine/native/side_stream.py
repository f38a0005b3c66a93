"""How adapters come to a GPU without holding up its steps: on a CUDA stream of their own."""

from collections.abc import Callable

import torch

from server.engine.native.adapter_weights import Weights, tensors_of


class SideStream:
    """The stream of one thread, which loads adapters.

    Args:
        device: of the model, whose weights are loaded. Only CUDA has streams; elsewhere a load is
            called as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the stream may read the base's weights
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def load(self, prepare: Callable[[], Weights]) -> Weights:
        """Call a function that puts an adapter on the device, and wait until it is there.

        What it returns may be used on the default stream, which is that of the steps.
        """
        if self._stream is None:
            return prepare()
        with torch.cuda.stream(self._stream):
            weights = prepare()
        self._stream.synchronize()
        steps = torch.cuda.default_stream(self._stream.device)
        for tensor in tensors_of(weights):
            tensor.record_stream(steps)  # its memory is not given away before these have read it
        return weights
