"""What vLLM says after each of its steps, for `EngineStats`."""

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from server.engine.request import EngineCounters


class StepStats(StatLoggerBase):
    """vLLM calls `record` after a step, on the event loop.

    Attributes:
        counters: since the start, but for the tokens of answers, which vLLM counts otherwise.
        num_running, num_waiting: sequences, after the last step.
        kv_cache_usage: the share of blocks in use then.
    """

    def __init__(self) -> None:
        self.counters = EngineCounters()
        self.num_running = 0
        self.num_waiting = 0
        self.kv_cache_usage = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:
        """Take the statistics of a step; None: it has none."""
        if scheduler_stats is not None:
            self._take_state(scheduler_stats)
        if iteration_stats is not None:
            self.counters.num_steps += 1
            self.counters.num_preemptions += iteration_stats.num_preempted_reqs
            self.counters.prompt_tokens += iteration_stats.num_prompt_tokens

    def log_engine_initialized(self) -> None:
        """Nothing to do."""

    def _take_state(self, stats: Any) -> None:
        self.num_running = stats.num_running_reqs
        self.num_waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        self.kv_cache_usage = stats.kv_cache_usage
        self.counters.prefix_cache_queries += stats.prefix_cache_stats.queries
        self.counters.prefix_cache_hits += stats.prefix_cache_stats.hits
