"""What a server counts, for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150)


class Metrics:
    """
    Counters of one server.

    Args:
        num_slots: Slots of the decoder.
    """

    def __init__(self, num_slots: int) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry, "namespace": "glm_hf"}
        self.requests = Counter("requests", "Requests by path and status", ["path", "status"], **named)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **named)
        self.tokens = Counter("generated_tokens", "Tokens that were generated", **named)
        self.waiting = Gauge("requests_waiting", "Blanks that wait for a slot", **named)
        self.slots_in_use = Gauge("slots_in_use", "Slots in use", **named)
        Gauge("slots", "Slots", **named).set(num_slots)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "Time from a request to its first token", buckets=SECONDS, **named
        )

    def text(self) -> bytes:
        """Return all counters in Prometheus' format."""
        return generate_latest(self.registry)
