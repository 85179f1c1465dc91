"""Figures for Prometheus: what the server does, and what drafting brings."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..decode.request import Stats
from .registry import Models

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Bounds of the histograms: from a cached prompt on a fast machine to a long answer on a slow one."""


class Metrics:
    """The figures of one server."""

    def __init__(self, models: Models) -> None:
        """Takes the models, whose answers are counted whenever the figures are read."""
        self._models, self._registry = models, CollectorRegistry()
        self._running = Gauge(
            "mlx_mtp_answers", "Answers that run or wait for a row", ["model"], registry=self._registry
        )
        self._loaded = Gauge("mlx_mtp_model_loaded", "1 if the model is loaded", ["model"], registry=self._registry)
        self._ended = self._counter("answers_ended", "Answers that have ended, by finish reason", "finish_reason")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts")
        self._cached = self._counter("cached_tokens", "Tokens of prompts whose KV was reused")
        self._generated = self._counter("generated_tokens", "Tokens generated")
        self._rounds = self._counter("rounds", "Verify passes, counted for each row")
        self._drafted = self._counter("drafted_tokens", "Tokens drafted, by source", "source")
        self._accepted = self._counter("accepted_tokens", "Drafts accepted, by source", "source")
        self._first = self._histogram("first_token_seconds", "From the request to the first token")
        self._rest = self._histogram("generation_seconds", "From the first token to the last")

    def count(self, model: str, ended: Iterable[tuple[str, Stats]]) -> None:
        """Counts answers that have ended.

        Args:
            model: Name of the model.
            ended: Their finish reasons, or "unfinished" after an error or when the client left, and statistics.
        """
        for reason, stats in ended:
            self._ended.labels(model, reason).inc()
            self._prompt.labels(model).inc(stats.prompt_tokens)
            self._cached.labels(model).inc(stats.cached_tokens)
            self._generated.labels(model).inc(stats.generated_tokens)
            self._rounds.labels(model).inc(stats.rounds)
            for counter, by_source in (
                (self._drafted, stats.drafted_by_source),
                (self._accepted, stats.accepted_by_source),
            ):
                for source, tokens in by_source.items():
                    counter.labels(model, source).inc(tokens)
            if stats.generated_tokens:
                self._first.labels(model).observe(stats.prompt_seconds)
                self._rest.labels(model).observe(stats.generation_seconds)

    def text(self) -> bytes:
        """All figures, in Prometheus's text format."""
        for name, entry in self._models.entries.items():
            self._running.labels(name).set(entry.answers)
            self._loaded.labels(name).set(entry.lm is not None)
        return generate_latest(self._registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"mlx_mtp_{name}", what, ["model", *labels], registry=self._registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"mlx_mtp_{name}", what, ["model"], registry=self._registry, buckets=_SECONDS)
