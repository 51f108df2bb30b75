"""Counters of a server in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

PREFIX = "sparse_peft"
HELP = {
    "requests_total": ("counter", "Answered requests by endpoint and HTTP status."),
    "request_seconds": ("histogram", "Seconds from a request to the end of its answer."),
    "prompt_tokens_total": ("counter", "Tokens of prompts."),
    "completion_tokens_total": ("counter", "Generated tokens."),
    "batches_total": ("counter", "Batches that were generated."),
    "batch_rows_total": ("counter", "Requests in these batches."),
    "mixed_batches_total": ("counter", "Batches whose rows used different adapters."),
    "queue_requests": ("gauge", "Requests that wait for a batch."),
    "adapters_registered": ("gauge", "Adapters that can be asked for."),
    "adapters_loaded": ("gauge", "Adapters in memory."),
    "adapter_bytes": ("gauge", "Memory of the loaded adapters."),
    "pool_hits_total": ("counter", "Uses of adapters that were loaded already."),
    "pool_misses_total": ("counter", "Uses that loaded an adapter."),
    "pool_evictions_total": ("counter", "Adapters that were unloaded for others."),
}
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Counters and a histogram, for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[tuple[str, str], float] = defaultdict(float)

    def add(self, name: str, amount: float = 1, **labels: str | float) -> None:
        """Raise a counter.

        Args:
            name: one of ``HELP``.
            amount: by how much.
            **labels: of the counter; chosen by the server, never texts of clients.
        """
        text = ",".join(f'{key}="{value}"' for key, value in labels.items())
        with self._lock:
            self._counts[name, f"{{{text}}}" if text else ""] += amount

    def observe(self, name: str, seconds: float) -> None:
        """Count a duration in a histogram."""
        for bound in (*BUCKETS, float("inf")):
            if seconds <= bound:
                self.add(f"{name}_bucket", le="+Inf" if bound == float("inf") else bound)
        self.add(f"{name}_sum", seconds)
        self.add(f"{name}_count")

    def text(self, now: Mapping[str, float]) -> str:
        """All counters, and these values of the moment."""
        with self._lock:
            counts = {**self._counts, **{(name, ""): float(value) for name, value in now.items()}}
        lines = []
        for name, (kind, meaning) in HELP.items():
            lines += [f"# HELP {PREFIX}_{name} {meaning}", f"# TYPE {PREFIX}_{name} {kind}"]
            of_it = [key for key in counts if key[0] == name or (kind == "histogram" and key[0].startswith(name))]
            lines += [f"{PREFIX}_{key}{labels} {counts[key, labels]:.10g}" for key, labels in of_it]
        return "\n".join(lines) + "\n"
