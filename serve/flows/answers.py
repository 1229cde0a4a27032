"""What an ingress replica has answered, and how long it took."""

from collections import Counter
from dataclasses import dataclass, field

from serve.telemetry import Samples


@dataclass(slots=True)
class Answers:
    """Replies by class and status; seconds of each, until they are read.

    `took` is from arrival to the first byte, by class; `tokenised` is that part of it, `encoded` is from the
    vectors on, both of requests that used a model.
    """

    replies: Counter[tuple[str, str]] = field(default_factory=Counter)
    took: Samples = field(default_factory=Samples)
    tokenised: Samples = field(default_factory=Samples)
    encoded: Samples = field(default_factory=Samples)

    def add(self, klass: str, status: int, took_s: float) -> None:
        """One more reply has begun."""
        self.replies[klass, str(status)] += 1
        self.took.add(took_s, klass)
