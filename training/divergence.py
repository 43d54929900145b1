"""Watching for divergence: losses and gradients that are not finite, and spikes of the embedding's gradient.

In GLM-130B's training, the norm of the embedding's gradient leapt some steps before the loss did.
"""

import json
import math
import statistics
from collections import deque
from operator import itemgetter
from pathlib import Path
from typing import Any

DIVERGENCE_FILE = "divergence.json"
WINDOW = 100
LEAST_HISTORY = 20  # norms seen before a spike can be told


class DivergenceError(RuntimeError):
    """Training has stopped itself; the weights are those of the step before."""


class DivergenceWatch:
    """
    Remember the norms of the embedding's gradient and tell when one spikes.

    Args:
        spike_threshold: Multiple of the median of the last norms that counts as a spike.
    """

    def __init__(self, spike_threshold: float) -> None:
        self.spike_threshold = spike_threshold
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def observe(self, loss: float, grad_norm: float, embedding_norm: float | None) -> str | None:
        """
        Take note of a step before its update.

        Args:
            loss: Of the step.
            grad_norm: Of all gradients.
            embedding_norm: Of the embedding's gradient; None if it has none.

        Returns:
            What is wrong, in words, or None. Norms of such steps are not remembered.
        """
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the norm of the gradient is {grad_norm}"
        if embedding_norm is None:
            return None
        if not math.isfinite(embedding_norm):
            return f"the norm of the embedding's gradient is {embedding_norm}"
        if len(self.norms) >= LEAST_HISTORY:
            median = statistics.median(self.norms)
            if embedding_norm > self.spike_threshold * median:
                return f"the norm of the embedding's gradient is {embedding_norm:.3g}, {median:.3g} in the median"
        self.norms.append(embedding_norm)
        return None

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue watching."""
        return {"norms": list(self.norms)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from the `state` of another watch."""
        self.norms = deque(state["norms"], maxlen=WINDOW)


def stop_message(step: int, reason: str, file: Path) -> str:
    """Return why training stops before the update of a step, and how to resume."""
    return (
        f"training stops before the update of step {step}: {reason}; its samples are in {file}. Resume from an "
        f'earlier checkpoint with skip_data_ranges=["{step}-{step}"], a lower learning rate or a lower alpha'
    )


def record_event(folder: str | Path, event: dict[str, Any], *, writes: bool) -> Path:
    """
    Append an event to the list in divergence.json, and return the file.

    Args:
        folder: Output folder of the run.
        event: Event with its `samples`, first those whose `loss` is not finite, then the highest. Values that are
            not finite are written as text.
        writes: Whether this process does.
    """
    file = Path(folder) / DIVERGENCE_FILE
    if not writes:
        return file
    loss = itemgetter("loss")
    order = sorted(event["samples"], key=lambda row: loss(row) if math.isfinite(loss(row)) else math.inf, reverse=True)
    events = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    events.append(_finite(event | {"samples": order}))
    file.write_text(json.dumps(events, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return file


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
