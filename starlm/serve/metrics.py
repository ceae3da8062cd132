"""What /metrics says, in Prometheus' format."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from starlm.generate.engine import Engine

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one server; the gauges are read from its engines when they are asked for."""

    def __init__(self, engines: Callable[[], Mapping[str, "Engine"]]) -> None:
        """Args: engines: those that run, by the name of the model."""
        registry = self._registry = CollectorRegistry()
        registry.register(_Gauges(engines))
        self.requests = Counter(
            "starlm_http_requests", "Answered requests.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter(
            "starlm_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "starlm_cached_tokens", "Tokens of prompts whose state was kept.", ["model"], registry=registry
        )
        self.generation_tokens = Counter(
            "starlm_generation_tokens", "Tokens generated.", ["model"], registry=registry
        )
        self.finished = Counter(
            "starlm_answers", "Answers by how they ended.", ["model", "finish"], registry=registry
        )
        self.first = Histogram(
            "starlm_time_to_first_token_seconds",
            "From the request to the first piece of an answer.",
            ["model"],
            buckets=_FIRST,
            registry=registry,
        )
        self.between = Histogram(
            "starlm_inter_token_latency_seconds",
            "Between two pieces of an answer.",
            ["model"],
            buckets=_BETWEEN,
            registry=registry,
        )

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, engines: Callable[[], Mapping[str, "Engine"]]) -> None:
        self._engines = engines

    def collect(self) -> Iterable[Metric]:
        running = GaugeMetricFamily("starlm_requests_running", "Sequences in a slot.", labels=["model"])
        waiting = GaugeMetricFamily("starlm_requests_waiting", "Requests in the queue.", labels=["model"])
        for name, engine in self._engines().items():
            stats = engine.stats()
            running.add_metric([name], stats.running)
            waiting.add_metric([name], stats.waiting)
        return running, waiting
