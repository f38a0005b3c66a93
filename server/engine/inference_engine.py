"""The seam: everything that the server asks of an engine.

`server.service` and `server.http` know an engine by this Protocol, by `request.py` and by
`errors.py`; only `server.engines` names an implementation. `server.engine.native` is ours.
`tests/engine` holds every implementation to the same behaviour.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from server.engine.request import Constraint, EngineStats, Request, RequestOutput

if TYPE_CHECKING:
    from crma.method.backbone import Backbone
    from crma.method.lora import Lora

    Loader = Callable[[], Lora | Backbone]

Outputs = AsyncGenerator[RequestOutput, None]
"""The outputs of one request, as they come."""


@dataclass(frozen=True)
class ServedModel:
    """The base model as it is served.

    digest: of its source files. dtype: of weights and KV cache, with the quantization, as in
    "bfloat16+int8". max_model_len: most tokens of a prompt and its answer together. num_tokens:
    token ids lie below it.
    """

    name: str
    digest: str
    dtype: str
    max_model_len: int
    num_tokens: int


class InferenceEngine(Protocol):
    """Runs requests on one base model, each with the adapters that it selected.

    A request selects adapters by digest (`Request.selection`). An adapter is registered first,
    then loaded when a request needs it or an administrator asks for it; least recently used ones
    make room. The methods are called on the event loop and do not block it; `stats` may be called
    in any thread.

    Attributes:
        model: what is served.
        on_failure: ends the server. Called in any thread when the engine can run no more requests;
            the server calls it too if it cannot start.
    """

    model: ServedModel
    on_failure: Callable[[], None]

    async def check(self, constraint: Constraint) -> None:
        """Check a constraint, and make it ready for the requests that will have it.

        Raises:
            InvalidConstraint: no answer can keep to it, or it is malformed, too large or has a part
                that this engine cannot honour.
            QueueFull: too many constraints wait to be checked.
            EngineStopped: as `submit`.
        """
        ...

    def submit(self, request: Request) -> Outputs:
        """Queue a request, whose constraint has been checked; its outputs follow.

        Closing the generator aborts the request, once its first output has been asked for. Before
        that only `abort` ends it.

        Raises:
            EngineStopped, QueueFull, PromptTooLong: at once; nothing was queued.
            UnsupportedRequest: likewise; this engine would not do what an option asks for.
            StoreError, AdapterPoolFull: from the generator, instead of an output: an adapter
                cannot be loaded.
        """
        ...

    def abort(self, request_id: str) -> None:
        """End a request; its sequences finish with reason abort. Unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """The state after the last step."""
        ...

    async def warm_up(self) -> None:
        """Run the first step, so that the first user does not wait for it.

        Raises:
            EngineStopped: the step failed.
        """
        ...

    async def close(self) -> None:
        """Take no new requests, end those that run, and free threads and memory."""
        ...

    def register(self, digest: str, loader: Loader, num_parameters: int) -> None:
        """Make an adapter loadable.

        `loader` is called off the event loop; the last one registered counts.
        """
        ...

    async def load(self, digest: str) -> None:
        """Make an adapter resident.

        Raises:
            NotFound: it is not registered.
            AdapterPoolFull: the adapters in use or pinned leave no room.
            StoreError: raised by the loader, or the adapter does not fit the model.
        """
        ...

    async def unload(self, digest: str, *, wait_s: float = 0.0, cancel: bool = False) -> None:
        """Free a resident adapter. No-op if it is not resident.

        Args:
            wait_s: longest wait for the requests that use it; meanwhile no other request can start
                with it.
            cancel: abort the running ones, with the error "unloaded", once no other can start.
                Requests that have not started may run later: they load the adapter again.

        Raises:
            AdapterInUse: it is pinned, or still in use after the wait; it stays resident.
        """
        ...

    async def pin(self, digest: str) -> None:
        """Load an adapter and keep it resident until `unpin`. Once is enough. Raises as `load`."""
        ...

    def unpin(self, digest: str) -> None:
        """Let a pinned adapter be evicted again."""
        ...

    def resident(self) -> tuple[str, ...]:
        """Digests of the adapters in memory."""
        ...
