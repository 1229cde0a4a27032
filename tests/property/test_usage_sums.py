"""The sums of usage events are what the Store is told, whatever fails, and each event is known by its id."""

import json
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from serve.admission.metering import Row, UsageEvents
from serve.admission.usage import SESSIONS_MAX, UsageCount


COUNTED = st.tuples(
    st.sampled_from("ab"),
    st.sampled_from(("charged", "refused", "refunded")),
    st.sampled_from(("", "mini")),
    st.integers(0, 99),
)
STEPS = st.lists(st.one_of(COUNTED, st.sampled_from(("write", "fail", "turn"))), max_size=80)


class Process:
    """Counts both ways, as `Quotas` does."""

    def __init__(self) -> None:
        self.events, self.usage = UsageEvents("r"), UsageCount("r", "2026-11-01")
        self.told: dict[str, dict] = {}
        self.heard: dict[tuple[str, str], tuple[int, int, int]] = {}
        self.turns = 0

    def count(self, key: str, outcome: str, model: str, tokens: int) -> None:
        row = Row("2026-11", "ann", key, "bulk", "embeddings", model, outcome)
        tokens *= outcome == "charged"
        self.events.count(row, requests=1, tokens=tokens, now=0.0)
        refused = outcome == "refused"
        if outcome != "refunded":
            counts = {"requests": 1 - refused, "tokens": tokens, "refused": refused}
            self.usage.count("ann", key, "bulk", **counts)

    def turn(self) -> None:
        if self.turns < SESSIONS_MAX - 1:  # beyond it, either forgets
            self.turns += 1
            self.events.end()
            self.usage.turn(f"2026-11-{1 + self.turns:02}")

    def fail(self) -> None:
        """The sink fails after it has written all of an interval."""
        if (interval := self.events.due()) is not None:
            self._written(interval)

    def write(self) -> None:
        while (interval := self.events.due()) is not None:
            self._written(interval)
            self.events.done(interval)
        for report in self.usage.due():
            for row in report.rows:
                self.heard[report.session, row.key] = row.requests, row.tokens, row.refused
            self.usage.done(report)

    def _written(self, interval) -> None:
        for line in self.events.written(interval):
            event = json.loads(line)
            assert self.told.setdefault(event["id"], event) == event


@given(STEPS)
def test_events_come_to_what_the_store_hears(steps):
    process = Process()
    for step in steps:
        if isinstance(step, str):
            getattr(process, step)()
        else:
            process.count(*step)
    process.write()

    sums: Counter = Counter()
    for event in process.told.values():
        data = event["data"]
        sums[data["key"], data["outcome"]] += data["requests"]
        sums[data["key"], "tokens"] += data["tokens"]
    for key in "ab":
        rows = [row for (_, of), row in process.heard.items() if of == key]
        heard = [sum(row[place] for row in rows) for place in range(3)]
        assert [sums[key, name] for name in ("charged", "tokens", "refused")] == heard
