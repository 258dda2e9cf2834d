"""Metrics of a server in Prometheus' text format; no label holds what a client chooses.

Importing this module does not import prometheus_client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llava.utils.lookup import require

GAUGES = {
    "llava_requests_running": "requests that are answered",
    "llava_requests_waiting": "requests that wait for a place",
    "llava_slots_in_use": "sequences that hold a slot",
    "llava_kv_cache_bytes": "bytes of keys and values of running sequences",
    "llava_prefix_cache_bytes": "bytes of keys and values, and of preprocessed images, kept for later requests",
    "llava_workers": "workers",
}
COUNTERS_OF_MODEL = {
    "llava_prompt_tokens": "tokens of prompts, images included",
    "llava_prompt_tokens_cached": "tokens of prompts that were not computed again",
    "llava_generated_tokens": "tokens of answers",
    "llava_images": "images of requests",
}
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
HISTOGRAMS = {
    "llava_time_to_first_token_seconds": "seconds from a request to its first token",
    "llava_request_seconds": "seconds of a request",
}
HISTOGRAMS_OF_MODEL = {"llava_step_seconds": "seconds of a step of the engine"}


class ServerMetrics:
    """Counters, gauges and histograms of one server.

    Attributes:
        content_type: content type of `text`.
    """

    def __init__(self, gauges: Mapping[str, Callable[[], float]], *, has_model: bool = True) -> None:
        """Create the metrics that the server knows.

        Args:
            gauges: functions that return current values, by names of `GAUGES`; the others are left out.
            has_model: whether a model answers here; otherwise tokens, images and steps are left out.
        """
        client = require("prometheus_client", "serve")
        self._registry = client.CollectorRegistry(auto_describe=True)
        for name, value in gauges.items():
            client.Gauge(name, GAUGES[name], registry=self._registry).set_function(value)
        counters = COUNTERS_OF_MODEL if has_model else {}
        self._counters: dict[str, Any] = {
            name: client.Counter(name, text, registry=self._registry) for name, text in counters.items()
        }
        self._requests = client.Counter(
            "llava_requests", "requests for an answer", ["protocol", "code"], registry=self._registry
        )
        self._histograms: dict[str, Any] = {
            name: client.Histogram(name, text, buckets=SECONDS, registry=self._registry)
            for name, text in {**HISTOGRAMS, **(HISTOGRAMS_OF_MODEL if has_model else {})}.items()
        }
        self._write = client.generate_latest
        self.content_type: str = client.CONTENT_TYPE_LATEST

    def add(self, name: str, number: int) -> None:
        """Add to a counter of `COUNTERS_OF_MODEL`; nothing without a model."""
        if name in self._counters:
            self._counters[name].inc(number)

    def count_request(self, protocol: str, code: str) -> None:
        """Count a request that is over."""
        self._requests.labels(protocol=protocol, code=code).inc()

    def observe(self, name: str, seconds: float) -> None:
        """Add a value to a histogram."""
        self._histograms[name].observe(seconds)

    def text(self) -> bytes:
        """Return all metrics as text."""
        text: bytes = self._write(self._registry)
        return text
