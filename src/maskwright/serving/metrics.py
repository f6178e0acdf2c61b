"""Metrics of the service for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from maskwright.serving.messages import Answer

MEDIA_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one service. Labels have fixed sets of values, so clients cannot add time series."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "maskwright_requests", "Answered requests.", ("route", "status"), registry=self._registry
        )
        self.queue = Gauge("maskwright_queue", "Requests accepted and not answered.", registry=self._registry)
        self.queue_limit = Gauge("maskwright_queue_limit", "The value of --max-queue.", registry=self._registry)
        self.ready = Gauge("maskwright_ready", "1 if the models are loaded.", registry=self._registry)
        self.crashes = Counter(
            "maskwright_model_process_crashes", "Unexpected ends of the model process.", registry=self._registry
        )
        self.batches = Histogram(
            "maskwright_batch_images",
            "Images segmented together, observed once per image.",
            buckets=_BATCHES,
            registry=self._registry,
        )
        self.stages = Histogram(
            "maskwright_stage_seconds", "Time per stage.", ("stage",), buckets=_SECONDS, registry=self._registry
        )

    def add(self, answer: Answer) -> None:
        """Count the stages of an answer."""
        if answer.batch:
            self.batches.observe(answer.batch)
        for stage, seconds in answer.seconds.items():
            self.stages.labels(stage).observe(seconds)

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
