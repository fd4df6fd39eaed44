"""What Prometheus reads at /metrics."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from deepstack_jax.serve.engine import Engine, compilations

_FIRST = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_WHOLE = (0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server, in a registry of its own, so that two of them fit into one process."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()

        def gauge(name: str, meaning: str) -> Gauge:
            return Gauge(f"deepstack_{name}", meaning, registry=registry)

        self.requests = Counter(
            "deepstack_requests",
            "Requests that are over, by status, a stream by its end.",
            ["path", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("deepstack_prompt_tokens", "Tokens read, those of images included.", registry=registry)
        self.answer_tokens = Counter("deepstack_answer_tokens", "Tokens of whole answers.", registry=registry)
        self.first_token = Histogram(
            "deepstack_first_token_seconds", "From a request to its first words.", buckets=_FIRST, registry=registry
        )
        self.answer_seconds = Histogram(
            "deepstack_answer_seconds", "From a request to the end of its answer.", buckets=_WHOLE, registry=registry
        )
        gauge("slots", "Answers that can be made at once.").set(engine.limits.slots)
        gauge("slots_taken", "Answers that are being made.").set_function(lambda: engine.load[0])
        gauge("waiting", "Requests that wait for a slot.").set_function(lambda: engine.load[1])
        counter, before = compilations(), compilations().count
        gauge("compilations", "Programs compiled since the warm-up; 0 is what is expected.").set_function(
            lambda: counter.count - before
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' format."""
        return generate_latest(self._registry)
