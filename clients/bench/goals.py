"""What the server has to reach on every class of processor, and what was found."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from bench.metrics import Key, ratios
from bench.workloads import ALL_ROWS, speed_limit

Figures = Mapping[Key, Sequence[float | None]]
"""The main figure of a row on an engine, in each repetition."""

SERVER, INT8 = "server", "int8"
# Peers by the bits of their weights, which are those of the server's two configurations.
LLAMA_CPP = {16: ("llama.cpp", "llama.cpp-bf16"), 8: ("llama.cpp-int8",)}
PEFT = "peft"


def weight_bytes(engine: str) -> int:
    """Bytes of a weight of the base model: what has `int8` in its name reads 8 bits."""
    return 1 if INT8 in engine else 2


@dataclass(frozen=True)
class Goal:
    """A quotient that has to be large enough.

    Args:
        label: for a person.
        must: the least.
        aim: better.
        measured: whose figure it is.
        compared: of these the one with the best figure divides it; none: what the machine could do.
    """

    label: str
    must: float
    aim: float
    measured: Key
    compared: tuple[Key, ...] = ()

    def found(self, figures: Figures, limits: Mapping[str, float]) -> list[float | None]:
        """The quotient in each repetition; nothing where something was not measured.

        Args:
            figures: of all rows that were measured.
            limits: the machine's, as `limits.measure_limits` returns them.
        """
        values = figures.get(self.measured)
        if values is None:
            return []
        if not self.compared:
            row, engine = self.measured
            limit = speed_limit(ALL_ROWS[row], limits, weight_bytes(engine))
            return ratios(values, [limit] * len(values))
        others = [figures[key] for key in self.compared if key in figures]
        if not others:
            return []
        return ratios(values, max(others, key=_middle))


def _middle(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return median(known) if known else 0.0


def goals(engines: Iterable[str]) -> list[Goal]:
    """All goals.

    Args:
        engines: names of all that is measured; what is not the server is a peer.
    """
    peers = [name for name in engines if name not in (SERVER, INT8)]
    per_llama_cpp = [
        _per_llama_cpp(f"{label} / llama.cpp, {bits} bits a weight", must, aim, (row, own), bits)
        for label, row, must, aim in (
            ("one stream", "single", 1.0, 1.2),
            ("16 at once", "base", 2.0, 4.0),
            ("512-token prompt", "prefill", 1.2, 2.0),
        )
        for bits, own in ((16, SERVER), (8, INT8))
    ]
    per_best_peer = tuple(("mixed", peer) for peer in (*peers, PEFT))
    return [
        Goal("one stream: share of read bandwidth", 0.65, 0.85, ("single", SERVER)),
        Goal("one stream, int8: share of read bandwidth", 0.55, 0.75, ("single", INT8)),
        Goal("16 at once: share of min(bandwidth, GEMM)", 0.40, 0.55, ("base", SERVER)),
        Goal("512-token prompt: share of GEMM", 0.40, 0.60, ("prefill", SERVER)),
        _within_server("8 adapters mixed / none", 0.85, 0.95, "mixed", "base"),
        _within_server("CRMA on / off", 0.97, 0.99, "crma-on", "crma-off"),
        _within_server("64 adapters in random order / 8", 0.85, 0.85, "churn-64", "churn-8"),
        *per_llama_cpp,
        Goal("8 adapters mixed / best peer", 3.5, 6.0, ("mixed", SERVER), per_best_peer),
    ]


def _within_server(label: str, must: float, aim: float, row: str, other: str) -> Goal:
    return Goal(label, must, aim, (row, SERVER), ((other, SERVER),))


def _per_llama_cpp(label: str, must: float, aim: float, measured: Key, bits: int) -> Goal:
    row, _ = measured
    return Goal(label, must, aim, measured, tuple((row, peer) for peer in LLAMA_CPP[bits]))
