"""Usage as events: what they say, that their sums are the Store's, and what a sink's failure does."""

import json

import pytest

from serve.admission import metering
from serve.admission.metering import Meter, Row, UsageEvents


NOON = 1_796_083_199.0 - 86_400 / 2
"""On 30 November 2026, in UTC."""


def row(**changes: str) -> Row:
    told = {
        "month": "2026-11",
        "tenant": "ann",
        "key": "k1",
        "klass": "interactive",
        "operation": "embeddings",
        "model": "mini",
        "outcome": "charged",
    }
    return Row(**told | changes)


def use(events: UsageEvents, tokens: int = 10, now: float = NOON, **changes: str) -> None:
    events.count(row(**changes), requests=1, tokens=tokens, now=now)


def taken(events: UsageEvents) -> list[dict]:
    interval = events.due()
    assert interval is not None
    lines = events.written(interval)
    events.done(interval)
    return [json.loads(line) for line in lines]


def test_an_event_is_a_cloudevent_that_says_who_used_what():
    events = UsageEvents("r#1/ab12")
    use(events)
    use(events, 5, NOON + 1.5)
    assert taken(events) == [
        {
            "specversion": "1.0",
            "type": "io.headrace.usage",
            "source": "/headrace/r%231/ab12",
            "id": "r#1/ab12/1/0",
            "subject": "ann",
            "time": "2026-11-30T11:59:59.000Z",
            "datacontenttype": "application/json",
            "data": {
                "month": "2026-11",
                "tenant": "ann",
                "key": "k1",
                "class": "interactive",
                "operation": "embeddings",
                "model": "mini",
                "outcome": "charged",
                "requests": 2,
                "tokens": 15,
                "until": "2026-11-30T12:00:00.500Z",
            },
        }
    ]
    assert events.due() is None


def test_whatever_differs_is_an_event_of_its_own_and_ids_never_come_again():
    events = UsageEvents("a")
    use(events)
    others = {"key": "k2", "operation": "search", "model": "", "outcome": "refused"}
    for name, value in others.items():
        use(events, **{name: value})
    first = taken(events)
    use(events)
    ids = [one["id"] for one in (*first, *taken(events))]
    assert len(first) == 1 + len(others)
    assert len(set(ids)) == len(ids)


def test_what_was_not_written_is_written_again_the_same_and_what_came_since_apart():
    events = UsageEvents("a")
    use(events)
    first = events.due()
    lines = events.written(first)
    use(events, 7)
    assert events.due() is first
    assert events.written(first) == lines
    events.done(first)
    assert [one["data"]["tokens"] for one in taken(events)] == [7]


def test_intervals_end_with_the_day_and_when_they_are_full_and_the_oldest_are_lost(monkeypatch):
    monkeypatch.setattr(metering, "INTERVALS_MAX", 2)
    events = UsageEvents("a", rows_max=2)
    events.end()
    use(events)
    events.end()
    use(events, month="2026-12")
    use(events, month="2026-12", key="k2")
    assert [one["data"]["month"] for one in taken(events)] == ["2026-11"]
    assert [one["data"]["key"] for one in taken(events)] == ["k1", "k2"]
    for number in range(100):
        use(events, key=f"n{number}")
    assert len(events._ended) <= metering.INTERVALS_MAX


class Sink:
    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.full = False

    def __call__(self, lines) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.lines += lines


async def test_while_the_sink_fails_one_interval_grows_and_nothing_is_lost(caplog):
    sink = Sink()
    events = UsageEvents("a")
    meter = Meter(events, sink)
    sink.full = True
    for _ in range(50):
        use(events)
        await meter.write()
    assert len(events._ended) == 1
    assert "usage events are written later" in caplog.text
    sink.full = False
    await meter.write()
    told = [json.loads(line)["data"]["tokens"] for line in sink.lines]
    assert told == [10, 490]


async def test_a_fault_that_is_not_the_sinks_is_not_taken_for_one():
    def broken(_lines) -> None:
        raise ValueError

    events = UsageEvents("a")
    use(events)
    with pytest.raises(ValueError):  # noqa: PT011  which one does not matter
        await Meter(events, broken).write()
