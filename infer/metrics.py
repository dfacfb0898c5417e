"""What a server tells Prometheus: the engine's counts, and how long clients wait."""

from collections.abc import Iterator
from math import isnan

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from infer.host import Host, Reply, Unavailable

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The registry of one server."""

    def __init__(self, host: Host):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCounts(host))
        self._first = self._histogram("puna_time_to_first_token_seconds", "From the request to its first token.")
        self._each = self._histogram("puna_time_per_token_seconds", "Between two tokens of one request, on average.")
        self._whole = self._histogram("puna_request_seconds", "From the request to its last token.")

    def observe(self, reply: Reply) -> None:
        """Counts a request that has ended."""
        if isnan(reply.first):
            return
        self._first.observe(reply.first - reply.asked)
        self._whole.observe(reply.last - reply.asked)
        if (tokens := len(reply.progress.tokens)) > 1:
            self._each.observe((reply.last - reply.first) / (tokens - 1))

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(name, about, buckets=SECONDS, registry=self.registry)


class _EngineCounts(Collector):
    """The engine's own numbers, read when they are asked for."""

    def __init__(self, host: Host):
        self._host = host

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        yield GaugeMetricFamily("puna_ready", "1 where requests are taken.", int(self._host.state == "ready"))
        try:
            engine = self._host.engine
        except Unavailable:
            return
        counts = engine.counts
        yield CounterMetricFamily("puna_steps", "Steps of the engine.", counts.steps)
        yield CounterMetricFamily("puna_prompt_tokens", "Tokens of prompts.", counts.prompt_tokens)
        yield CounterMetricFamily("puna_reused_tokens", "Those found in the cache.", counts.reused_tokens)
        yield CounterMetricFamily("puna_tokens", "Tokens made.", counts.tokens)
        finished = CounterMetricFamily("puna_requests", "Requests that have ended.", labels=["finish"])
        for why, count in dict(counts.finished).items():
            finished.add_metric([why], count)
        yield finished
        yield GaugeMetricFamily("puna_requests_running", "Requests in a row of the cache.", engine.running)
        yield GaugeMetricFamily("puna_requests_waiting", "Requests in the queue.", engine.waiting)
        yield GaugeMetricFamily("puna_rows", "Rows of the cache.", engine.rows)
        yield GaugeMetricFamily("puna_compiled_programs", "Programs compiled by this process.", engine.programs)
