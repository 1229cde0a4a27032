"""What the models of an embedder replica do, as metrics on Ray's Prometheus port (`metrics` beside it).

Their label is the model's id: the settings bound its values.
"""

import asyncio
from collections import Counter as Counts

from ray.util.metrics import Counter, Gauge

from deployments.metrics import PUBLISH_EVERY_S
from serve.embedding.holdings import Holdings


class ModelMetrics:
    """Counters that follow a pool's holdings, and the memory of each model."""

    def __init__(self) -> None:
        self._counters = {
            "loads": Counter("headrace_model_loads", "Loads of a model.", tag_keys=("model",)),
            "load_failures": Counter(
                "headrace_model_load_failures", "Loads that failed.", tag_keys=("model",)
            ),
            "breaks": Counter(
                "headrace_model_breaks",
                "Times that a model failed on a known good input.",
                tag_keys=("model",),
            ),
            "evictions": Counter(
                "headrace_model_evictions",
                "Unloads of a model, idle or to make room.",
                tag_keys=("model",),
            ),
        }
        self._bytes = Gauge(
            "headrace_model_bytes",
            "Memory of a loaded model as measured; 0 while it is not loaded.",
            tag_keys=("model",),
        )
        self._told: Counts[tuple[str, str]] = Counts()

    def update(self, holdings: Holdings) -> None:
        """Add what happened since the last time."""
        for model, (counts, size_bytes) in holdings.counts().items():
            tags = {"model": model}
            self._bytes.set(float(size_bytes), tags=tags)
            for name, counter in self._counters.items():
                count: int = getattr(counts, name)
                if count > self._told[name, model]:
                    counter.inc(count - self._told[name, model], tags=tags)
                    self._told[name, model] = count


async def publish_models(holdings: Holdings) -> None:
    """Keep the metrics up to date until cancelled."""
    metrics = ModelMetrics()
    while True:
        metrics.update(holdings)
        await asyncio.sleep(PUBLISH_EVERY_S)
