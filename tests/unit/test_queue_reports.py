"""deployments.ledger.Reports: what the embedders said last, for each tenant its own places."""

import pytest

from deployments import ledger
from deployments.ledger import Reports
from serve.records import QueuePlace, QueueReport


def place(tenant: str, klass="interactive") -> QueuePlace:
    return QueuePlace(tenant, klass, 1.0, 3, 30.0, 0.5, 0.0, 0.1, 0.2, 0.3, 90.0)


def report(replica: str, *places: QueuePlace, items: int = 3) -> QueueReport:
    return QueueReport("default", replica, items, 10.0 * items, 0.001, len(places), places)


@pytest.fixture
def reports(clock) -> Reports:
    return Reports(3.0, clock)


def test_a_tenant_sees_its_own_places_in_every_replica(reports):
    reports.keep(report("a", place("ann"), place("bob"), place("ann", "bulk")))
    reports.keep(report("b", place("bob")))
    first, second = reports.of("ann")
    assert (first.replica, first.places) == ("a", (place("ann"), place("ann", "bulk")))
    assert (second.replica, second.places, second.items) == ("b", (), 3)


def test_the_latest_report_of_a_replica_counts(reports):
    reports.keep(report("a", place("ann"), items=7))
    reports.keep(report("a", place("bob"), items=5))
    (only,) = reports.of("ann")
    assert (only.items, only.places) == (5, ())


def test_an_empty_queue_is_forgotten_at_once(reports):
    reports.keep(report("a", place("ann")))
    reports.keep(report("a", items=0))
    assert reports.of("ann") == ()


def test_a_replica_that_falls_silent_lapses(reports, clock):
    reports.keep(report("a", place("ann")))
    reports.keep(report("b", place("ann")))
    clock.advance(2)
    reports.keep(report("a", place("ann")))
    clock.advance(2)
    assert [one.replica for one in reports.of("ann")] == ["a"]


def test_the_reports_held_are_bounded(reports, monkeypatch):
    monkeypatch.setattr(ledger, "REPORTS_MAX", 2)
    for replica in ("a", "b", "c"):
        reports.keep(report(replica))
    assert [one.replica for one in reports.of("ann")] == ["b", "c"]
